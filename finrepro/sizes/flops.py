"""Floating-point operations of a catalogue entry, per token, from its sizes alone. It imports no
torch.

A multiply-add is 2. Only matrix products count: the linear layers of the blocks, attention's two
products (scores, values), and the output head; norms, activations, softmax and embeddings do not.
Attention at a sequence of `tokens` is counted in full (a token against all of them, as PaLM's
formula and torch's counter do) or causal (against half of them, as llm.c does).

Backward, a linear layer costs its forward product once for the gradient of its input and once for
that of its weight; either is left out where nothing asks for it. Sums over layers follow
`block_sizes`, so that factored layers are counted as what they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finrepro.sizes.shapes import block_sizes, depth, targeted

Sizes = Mapping[
    str, tuple[int, int]
]  # name within a block -> (in, out), in the order in which a block runs them
Convention = Literal["palm", "causal"]
# What attention takes its queries, keys and values from. A factored layer is `<layer>.a` and
# `<layer>.b`, a split one `<layer>.q.a` ...
SOURCES = {
    "gpt2": ("attn.c_attn",) * 3,
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}


@dataclass(frozen=True)
class Flops:
    """Operations a token, by where they are spent."""

    linear: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.head

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.linear + other.linear, self.attention + other.attention, self.head + other.head
        )


@dataclass(frozen=True)
class Product:
    """A linear layer's product, (tokens, inputs) by (inputs, outputs). `trained`: its weight
    gets a gradient; `slope`: its input does.
    """

    inputs: int
    outputs: int
    trained: bool
    slope: bool

    @property
    def forward(self) -> int:
        """Operations a token."""
        return 2 * self.inputs * self.outputs

    @property
    def backward(self) -> int:
        """Operations a token."""
        return self.forward * (self.trained + self.slope)


def width(model: Any) -> int:
    """Width of the hidden states; of the queries as well, all heads together."""
    return int(model.architecture["n_embd" if model.family == "gpt2" else "hidden_size"])


def positions(model: Any) -> int:
    """The longest sequence that the model has positions for."""
    return int(
        model.architecture["n_positions" if model.family == "gpt2" else "max_position_embeddings"]
    )


def head_parameters(model: Any) -> int:
    """Weights of the output head, whether or not the input embedding shares them."""
    return int(model.architecture["vocab_size"]) * width(model)


def matrix_parameters(model: Any, sizes: Sizes | None = None) -> int:
    """N of the MFU formulas: weights that take part in a matrix product - the blocks' linear layers
    and the output head.

    Embedding tables are in it only as far as the head shares them; norms and biases are not.
    """
    return depth(model) * _linear(sizes or block_sizes(model)) + head_parameters(model)


def forward(model: Any, tokens: int, causal: bool = False, sizes: Sizes | None = None) -> Flops:
    """A forward pass over sequences of `tokens`, a token. `sizes` replaces the entry's own
    linear layers.
    """
    attention = 4 * tokens * width(model) * (0.5 if causal else 1)
    layers = _linear(sizes or block_sizes(model))
    return Flops(
        2.0 * depth(model) * layers, float(depth(model) * attention), 2.0 * head_parameters(model)
    )


def generated(model: Any, context: int, sizes: Sizes | None = None) -> Flops:
    """One token after `context - 1` others whose keys and values are kept: it attends to
    `context` positions, its own among them.
    """
    return forward(model, context, sizes=sizes)


def products(
    sizes: Sizes,
    family: str,
    rank: int = 0,
    targets: str | tuple[str, ...] = "all-linear",
    first: bool = False,
) -> tuple[Product, ...]:
    """The products of a block in the order of a forward pass; with a `rank`, the base frozen and a
    LoRA's A and B behind each target.

    `first`: the block stands on frozen embeddings, so that what reads its input needs no gradient
    there.
    """
    if not rank:
        return tuple(Product(i, o, True, True) for i, o in sizes.values())
    adapted, found, moved = targeted(dict(sizes), targets), [], not first
    beside = moved  # what gate and up, which read the same, have before them
    for name, (inputs, outputs) in sizes.items():
        if name.removesuffix(".a") == "mlp.gate_proj":
            beside = moved
        slope = beside if name.removesuffix(".a") == "mlp.up_proj" else moved
        slope = slope and not (first and _reads_input(name, family))
        found.append(Product(inputs, outputs, False, slope))
        if name in adapted:
            found += [Product(inputs, rank, True, slope), Product(rank, outputs, True, True)]
            moved = True
    return tuple(found)


def training(
    model: Any,
    tokens: int,
    rank: int = 0,
    targets: str | tuple[str, ...] = "all-linear",
    checkpointing: bool = False,
    causal: bool = False,
    scored: float = 1.0,
    sizes: Sizes | None = None,
) -> Flops:
    """Forward and backward over sequences of `tokens`, a token: of every weight, or with a `rank`
    of a LoRA on frozen `targets`.

    `checkpointing` adds the second forward pass of the blocks, as torch makes it: it stops once it
    has what backward needs, before the last product of each block. `scored`: the share of positions
    whose logits are computed (1 unless the loss leaves some out before the head).
    """
    own, blocks, runs = sizes or block_sizes(model), depth(model), 2 if checkpointing else 1
    frozen = (
        bool(rank) and not checkpointing
    )  # transformers asks for the embeddings' gradients where an adapted model is checkpointed
    layers, at_first = (
        products(own, model.family, rank, targets, first) for first in (False, frozen)
    )
    linear = sum(blocks * (runs * each.forward + each.backward) for each in layers)
    linear -= sum(each.backward for each in layers) - sum(each.backward for each in at_first)
    linear -= blocks * layers[-1].forward * (runs - 1)
    score = 2 * tokens * width(model) * (0.5 if causal else 1)  # one of attention's two products
    asked = _asked(own, model.family, targets) if frozen else 4
    attention = score * (2 * runs * blocks + 4 * (blocks - 1) + asked)
    head = 2 * head_parameters(model) * scored * (2 if rank else 3)
    return Flops(float(linear), float(attention), float(head))


def model_flops(
    model: Any, tokens: int, convention: Convention, sizes: Sizes | None = None
) -> float:
    """What a token of pretraining or full fine-tuning is taken to cost for MFU, whatever the
    program recomputes.

    `palm`: 6 N + 12 L H Q T (Chowdhery et al., 2022, arXiv 2204.02311, appendix B), attention in
    full; `causal`: 6 N + 6 L H Q T (llm.c), half of it. L blocks, H Q the width of the queries, T
    tokens a sequence, N as in `matrix_parameters`.
    """
    attended = {"palm": 12, "causal": 6}[convention] * depth(model) * width(model) * tokens
    return 6.0 * matrix_parameters(model, sizes) + attended


def mfu(tokens_per_second: float, flops_per_token: float, peak: float, devices: int = 1) -> float:
    """The share of `devices` times `peak` FLOP/s that `tokens_per_second` of all of them use at
    `flops_per_token`.

    Model-FLOPs utilisation with `model_flops`, or for LoRA with `training` without checkpointing;
    hardware-FLOPs utilisation with `training` and what it recomputes.
    """
    return tokens_per_second * flops_per_token / (peak * devices)


def factored(sizes: Sizes, rank: int) -> dict[str, tuple[int, int]]:
    """The same layers with W (out, in) replaced by B A, A (rank, in) and B (out, rank):
    FinGPT-HPC's low-rank layer (arXiv 2402.13533).

    A layer in which the rank saves nothing stays as it is.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, (i, o) in sizes.items():
        saves = rank * (i + o) < i * o
        found |= {f"{name}.a": (i, rank), f"{name}.b": (rank, o)} if saves else {name: (i, o)}
    return found


def rank_for(model: Any, ratio: float, whole: bool = False) -> int:
    """The rank, one for all layers, whose factors shrink the blocks' linear weights, or the `whole`
    model, nearest to `ratio`-fold.

    0 where rank 1 is still too much: the rest of the model alone is more.
    """
    sizes, blocks = block_sizes(model), depth(model)
    weights = blocks * _linear(sizes)
    goal = model.parameters / ratio - (model.parameters - weights) if whole else weights / ratio

    def left(rank: int) -> int:
        return blocks * _linear(factored(sizes, rank))

    if left(1) > goal:
        return 0
    low, high = 1, max(max(size) for size in sizes.values())
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(middle) <= goal else (low, middle)
    return min((low, high), key=lambda rank: abs(left(rank) - goal))


def _linear(sizes: Sizes) -> int:
    return sum(inputs * outputs for inputs, outputs in sizes.values())


def _reads_input(name: str, family: str) -> bool:
    """Whether a layer reads the block's input: what attention takes its queries, keys and values
    from, or the first factor of that.
    """
    return any(
        name.removesuffix(".a") in (source, f"{source}.{part}")
        for source, part in zip(SOURCES[family], "qkv", strict=True)
    )


def _asked(sizes: Sizes, family: str, targets: str | tuple[str, ...]) -> int:
    """How many of attention's four backward products a block on frozen embeddings needs: for
    queries, keys, scores and values.
    """
    adapted = targeted(dict(sizes), targets)
    query, key, value = (
        any(f"{source}{rest}" in adapted for rest in ("", ".a", ".b", f".{part}.a", f".{part}.b"))
        for source, part in zip(SOURCES[family], "qkv", strict=True)
    )
    return query + key + (query or key) + value
