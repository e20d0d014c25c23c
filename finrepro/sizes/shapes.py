"""Sizes of a catalogue entry's linear layers, from its architecture alone."""

from functools import cache
from typing import TYPE_CHECKING, Any

from finrepro.sizes import low_rank

if TYPE_CHECKING:
    from collections.abc import Callable


def targeted(layers: dict[str, Any], targets: str | tuple[str, ...]) -> dict[str, Any]:
    """Those of named layers whose last name is among `targets`; all of them for `all-linear`."""
    return {
        name: layer
        for name, layer in layers.items()
        if targets == "all-linear" or name.rpartition(".")[2] in targets
    }


def absent(layers: dict[str, Any], targets: str | tuple[str, ...]) -> str | None:
    """Which of `targets` are the name of no layer, in one line with the names that there are; None
    if each is a layer's.
    """
    names = sorted({name.rpartition(".")[2] for name in layers})
    missing = sorted(set(() if targets == "all-linear" else targets) - set(names))
    if targets and not missing:
        return None
    return (
        f"no linear layer of the model is named {', '.join(missing) or 'anything'}; "
        f"there are {', '.join(names)}"
    )


def targeted_or_fail(layers: dict[str, Any], targets: str | tuple[str, ...]) -> dict[str, Any]:
    """As `targeted`. Raises `ValueError` with the line of `absent`."""
    if reason := absent(layers, targets):
        raise ValueError(reason)
    return targeted(layers, targets)


def block_sizes(model: Any) -> dict[str, tuple[int, int]]:
    """Name within a block -> (in, out) of its linear layers, from a catalogue entry; every block is
    alike.

    Those of a low-rank model are its factors: what a quantizer stores and an adapter is added to.
    """
    dense = dense_sizes(model)
    if model.low_rank is None:
        return dense
    return dict(
        _factor_sizes(model.low_rank, tuple(dense.items()), depth(model), other_parameters(model))
    )


def linear_parameters(model: Any) -> int:
    """Weights of the linear layers in all blocks: what a quantizer stores in fewer bits."""
    return depth(model) * sum(inputs * outputs for inputs, outputs in block_sizes(model).values())


@cache
def _factor_sizes(
    entry: low_rank.LowRank,
    dense: tuple[tuple[str, tuple[int, int]], ...],
    blocks: int,
    rest: int,
) -> dict[str, tuple[int, int]]:
    """Solved once a model: thousands of cells of a table ask for the same few."""
    sizes = dict(dense)
    return low_rank.factor_sizes(entry, sizes, low_rank.solve(entry, sizes, blocks, rest))


def rank(model: Any) -> int:
    """The rank of a low-rank catalogue entry's factors. Raises `ValueError` as `low_rank.solve`
    does.
    """
    return low_rank.solve(model.low_rank, dense_sizes(model), depth(model), other_parameters(model))


def other_parameters(model: Any) -> int:
    """Parameters of a catalogue entry that are no weights of its blocks' linear layers:
    embeddings, an output head, biases, norms.
    """
    shape, gpt2 = model.architecture, model.family == "gpt2"
    width = shape["n_embd" if gpt2 else "hidden_size"]
    if gpt2:
        biases = sum(outputs for _, outputs in dense_sizes(model).values())
        embeddings = (shape["vocab_size"] + shape["n_positions"]) * width
        return int(depth(model) * (biases + 4 * width) + embeddings + 2 * width)
    tables = 1 if shape.get("tie_word_embeddings") else 2
    return int(depth(model) * 2 * width + tables * shape["vocab_size"] * width + width)


def dense_sizes(model: Any) -> dict[str, tuple[int, int]]:
    """As `block_sizes`, of the dense model of the same architecture."""
    shape = model.architecture
    if model.family == "gpt2":
        width = shape["n_embd"]
        return {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width, keys),
        "self_attn.v_proj": (width, keys),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (width, inner),
        "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
    }


def counted(
    model: Any, targets: str | tuple[str, ...], a_layer: "Callable[[int, int], int]"
) -> int:
    """The sum of `a_layer(in, out)` over the targeted linear layers of all blocks of a catalogue
    entry.
    """
    return depth(model) * sum(
        a_layer(*size) for size in targeted(block_sizes(model), targets).values()
    )


def depth(model: Any) -> int:
    """How many blocks a catalogue entry has."""
    return int(model.architecture["n_layer" if model.family == "gpt2" else "num_hidden_layers"])
