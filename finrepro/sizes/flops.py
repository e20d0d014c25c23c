"""Floating-point operations of a catalogue entry, per token, from its sizes alone. It imports no
torch.

A multiply-add is 2. Only matrix products count: the linear layers of the blocks, attention's two
products (scores, values), and the output head; norms, activations, softmax and embeddings do not.
Attention at a sequence of `tokens` is counted in full (a token against all of them, as PaLM's
formula and torch's counter do) or causal (against half of them, as llm.c does).

In the backward pass a linear layer costs its forward product once for the gradient of its input and
once for that of its weight; either is left out where nothing needs it. Sums over layers follow
`block_sizes`, so that a factored layer is counted as its two factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finrepro.sizes.shapes import block_sizes, depth, targeted

# Name within a block -> (in, out), in the order in which a block runs them.
Sizes = Mapping[str, tuple[int, int]]
Convention = Literal["palm", "causal"]
# What attention takes its queries, keys and values from. A factored layer is `<layer>.a` and
# `<layer>.b`, a split one `<layer>.q.a` ...
SOURCES = {
    "gpt2": ("attn.c_attn",) * 3,
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}


@dataclass(frozen=True)
class Flops:
    """FLOPs a token, by where they are spent."""

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
    """A linear layer's product, (tokens, inputs) by (inputs, outputs), and which gradients the
    backward pass computes: of the weight, of the input.
    """

    inputs: int
    outputs: int
    weight_gradient: bool
    input_gradient: bool

    @property
    def forward(self) -> int:
        """FLOPs a token."""
        return 2 * self.inputs * self.outputs

    @property
    def backward(self) -> int:
        """FLOPs a token."""
        return self.forward * (self.weight_gradient + self.input_gradient)


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
    """One token generated after `context - 1` whose keys and values are cached: it attends to
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

    `first`: the block stands on frozen embeddings, so that the layers that read its input compute
    no gradient of it.
    """
    if not rank:
        return tuple(Product(i, o, True, True) for i, o in sizes.values())
    adapted, block = targeted(dict(sizes), targets), []
    trained_before = not first  # whether a trained weight lies before the layer's input
    trained_before_mlp = trained_before  # gate and up read the same input
    for name, (inputs, outputs) in sizes.items():
        if name.removesuffix(".a") == "mlp.gate_proj":
            trained_before_mlp = trained_before
        is_up = name.removesuffix(".a") == "mlp.up_proj"
        needed = trained_before_mlp if is_up else trained_before
        needed = needed and not (first and _reads_input(name, family))
        block.append(Product(inputs, outputs, False, needed))
        if name in adapted:
            block += [Product(inputs, rank, True, needed), Product(rank, outputs, True, True)]
            trained_before = True
    return tuple(block)


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
    """Forward and backward pass over sequences of `tokens`, FLOPs a token: of every weight, or with
    a `rank` of a LoRA on frozen `targets`.

    `checkpointing` adds the second forward pass of the blocks, as torch makes it: it stops once it
    has what backward needs, before the last product of each block. `scored`: the share of positions
    whose logits are computed (1 unless the loss leaves some out before the head).
    """
    layer_sizes, blocks, passes = sizes or block_sizes(model), depth(model), 1 + checkpointing
    # transformers computes the embeddings' gradients where an adapted model is checkpointed.
    frozen = bool(rank) and not checkpointing
    layers, first_layers = (
        products(layer_sizes, model.family, rank, targets, first) for first in (False, frozen)
    )
    linear = sum(blocks * (passes * layer.forward + layer.backward) for layer in layers)
    linear -= sum(layer.backward for layer in layers)
    linear += sum(layer.backward for layer in first_layers)
    linear -= blocks * layers[-1].forward * (passes - 1)
    score = 2 * tokens * width(model) * (0.5 if causal else 1)  # one of attention's two products
    first_backward = _attention_gradients(layer_sizes, model.family, targets) if frozen else 4
    attention = score * (2 * passes * blocks + 4 * (blocks - 1) + first_backward)
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


def factored(sizes: Sizes, rank: int) -> dict[str, tuple[int, int]]:
    """The same layers with W (out, in) replaced by B A, A (rank, in) and B (out, rank):
    FinGPT-HPC's low-rank layer (arXiv 2402.13533).

    A layer in which the rank saves nothing stays as it is.
    """
    factors: dict[str, tuple[int, int]] = {}
    for name, (i, o) in sizes.items():
        saves = rank * (i + o) < i * o
        factors |= {f"{name}.a": (i, rank), f"{name}.b": (rank, o)} if saves else {name: (i, o)}
    return factors


def rank_for(model: Any, ratio: float, of_model: bool = False) -> int:
    """The rank, one for all layers, at which the factors compress the blocks' linear layers, or
    with `of_model` the model as a whole, nearest to `ratio`-fold.

    0 where even rank 1 compresses less: the rest of the model alone is too large.
    """
    sizes, blocks = block_sizes(model), depth(model)
    weights = blocks * _linear(sizes)
    goal = model.parameters / ratio - (model.parameters - weights) if of_model else weights / ratio

    def weights_at(rank: int) -> int:
        return blocks * _linear(factored(sizes, rank))

    if weights_at(1) > goal:
        return 0
    low, high = 1, max(max(size) for size in sizes.values())
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if weights_at(middle) <= goal else (low, middle)
    return min((low, high), key=lambda rank: abs(weights_at(rank) - goal))


def _linear(sizes: Sizes) -> int:
    return sum(inputs * outputs for inputs, outputs in sizes.values())


def _reads_input(name: str, family: str) -> bool:
    """Whether a layer reads the block's input: what attention takes its queries, keys and values
    from, or the first factor of that.
    """
    return any(
        name.removesuffix(".a") in (source, f"{source}.{letter}")
        for source, letter in zip(SOURCES[family], "qkv", strict=True)
    )


def _attention_gradients(sizes: Sizes, family: str, targets: str | tuple[str, ...]) -> int:
    """How many of attention's four backward products a block on frozen embeddings computes: for
    queries, keys, scores and values.
    """
    adapted = targeted(dict(sizes), targets)
    query, key, value = (
        any(
            f"{source}{suffix}" in adapted
            for suffix in ("", ".a", ".b", f".{letter}.a", f".{letter}.b")
        )
        for source, letter in zip(SOURCES[family], "qkv", strict=True)
    )
    return query + key + (query or key) + value
