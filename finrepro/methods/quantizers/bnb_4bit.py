"""Block-wise 4-bit storage by bitsandbytes: NormalFloat4 and FP4 (Dettmers et al., 2023, arXiv
2305.14314, section 3).

Each block of `block_size` weights is divided by its largest magnitude and rounded to 16 levels;
with `double_quant` the block scales are themselves rounded to 8 bits in groups of 256. Bits per
weight: 4 + 32 / block_size, or 4 + 8 / block_size + 32 / (256 block_size).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from finrepro.settings import Choice, settings

if TYPE_CHECKING:
    from torch import Tensor, nn


@settings
class Config:
    """bitsandbytes' settings, each of them explicit."""

    quant_type: Literal["nf4", "fp4"]
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
    double_quant: bool
    quant_storage: Literal["uint8", "bfloat16"]
    compute_dtype: Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Stored:
    """A quantized weight: packed codes and bitsandbytes' state (scales, shape, code book)."""

    codes: "Tensor"
    state: Any
    config: Config


def supports(model: Any, quantizer: Choice, zero_stage: int) -> str | None:
    """None, or that a block would reach over the end of a row: it would have one scale for two
    outputs, and bitsandbytes' kernels for a single position, which need whole blocks in a row,
    would not be used.
    """
    return misaligned(model, quantizer)


def misaligned(model: Any, quantizer: Choice) -> str | None:
    """Which row of a catalogue entry's linear layers the quantizer's blocks do not divide, in
    one line; None if they divide all.
    """
    from finrepro.sizes.shapes import block_sizes

    block = quantizer.config.block_size
    odd = next(
        ((name, inputs) for name, (inputs, _) in block_sizes(model).items() if inputs % block), None
    )
    if odd is None:
        return None
    name, inputs = odd
    rank = (
        ": take a rank that they divide"
        if model.low_rank is not None and name.endswith(".b")
        else ""
    )
    return (
        f"{quantizer.name}: blocks of {block} do not divide rows of {inputs} weights ({name}){rank}"
    )


def encode(weight: "Tensor", config: Config) -> Stored:
    """Quantize a weight of shape (out, in), on its device."""
    import torch
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.contiguous(),
        blocksize=config.block_size,
        compress_statistics=config.double_quant,
        quant_type=config.quant_type,
        quant_storage=getattr(torch, config.quant_storage),
    )
    return Stored(codes, state, config)


def decode(stored: Stored) -> "Tensor":
    """The weight (out, in) that the codes stand for, in the dtype it had."""
    from bitsandbytes import functional

    return functional.dequantize_4bit(stored.codes, stored.state)


def linear(stored: Stored, bias: "Tensor | None", layer_class: Any = None) -> "nn.Module":
    """A frozen bitsandbytes layer around the stored weight, or one of a class made of it; PEFT
    takes it for the linear layer that it is.
    """
    import bitsandbytes
    import torch
    from torch import nn

    out_features, in_features = stored.state.shape
    config = stored.config
    layer = (layer_class or bitsandbytes.nn.Linear4bit)(
        in_features,
        out_features,
        bias=bias is not None,
        compute_dtype=getattr(torch, config.compute_dtype),
        compress_statistics=config.double_quant,
        quant_type=config.quant_type,
        quant_storage=getattr(torch, config.quant_storage),
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        stored.codes,
        requires_grad=False,
        quant_state=stored.state,
        blocksize=config.block_size,
        compress_statistics=config.double_quant,
        quant_type=config.quant_type,
        quant_storage=getattr(torch, config.quant_storage),
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = stored.state
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    # On CPUs with AVX512-BF16 an evaluation pass would repack the weight in place: other bits, and
    # lossy when saved.
    layer.support_avx512bf16_for_cpu = False
    layer.compute_type_is_set = True
    return layer


def weight(layer: Any) -> "Tensor":
    """The weight (out, in) that a layer of `linear` computes with, in the dtype it had."""
    from bitsandbytes import functional

    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def loading(config: Config) -> dict[str, Any]:
    """Transformers' BitsAndBytesConfig for such layers."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": config.compute_dtype,
        "bnb_4bit_quant_storage": config.quant_storage,
    }


def own_base(config: Config) -> str | None:
    """Why Transformers would make another base of the same weights: it knows blocks of 64 alone."""
    return (
        None
        if config.block_size == 64
        else f"its blocks are of {config.block_size} weights, Transformers' of 64"
    )


def layer_bytes(config: Config, inputs: int, outputs: int, dtype_bits: int) -> int:
    """`stored_bytes` of a linear layer's weight, from its size: 4 bits a weight, a scale a block
    of 4 bytes, or of 1 and 4 more for 256.
    """
    blocks = math.ceil(inputs * outputs / config.block_size)
    scales = blocks + 4 * math.ceil(blocks / 256) if config.double_quant else 4 * blocks
    return math.ceil(inputs * outputs / 2) + scales


def stored_bytes(stored: Stored) -> int:
    """Bytes as they lie in memory: codes and block scales. Not the code books, a kilobyte a
    layer, which are the same everywhere.
    """
    state = stored.state
    tensors = [stored.codes, state.absmax, *([state.state2.absmax] if state.nested else [])]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
