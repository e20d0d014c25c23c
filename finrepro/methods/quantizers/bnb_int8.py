"""LLM.int8() (Dettmers et al., 2022, arXiv 2208.07339) with bitsandbytes' operators: weights and
activations in 8 bits.

A row of the weight is divided by its largest magnitude and rounded to -127 ... 127, and so is each
row of the input, at each call. Input columns with a magnitude from `threshold` on keep the model's
dtype and meet de-quantised weights. The backward pass is that of a plain linear layer with the
de-quantised weight. An outlier column is one with an outlier in any row of the call, so a row's
rounding depends on the rows beside it: scores agree between layouts and numbers of ranks up to that
rounding, not bit by bit.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from finrepro.settings import Choice, settings

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

NOT_EXPORTED = {
    "merged": "int8 rounds the activations too, so that no dense model computes what was evaluated"
}


@settings
class Config:
    """`threshold`: the magnitude from which on an activation is an outlier; 0 rounds every
    column.
    """

    threshold: Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Stored:
    """A quantized weight: codes (out, in) in int8, the rows' largest magnitudes (out,) in
    float32, and the dtype it had.
    """

    codes: "Tensor"
    scales: "Tensor"
    dtype: "dtype"
    config: Config


def supports(model: Any, quantizer: Choice, zero_stage: int) -> str | None:
    """None, or that ZeRO-3 cannot divide such a weight, whose scales are no part of the
    parameter.
    """
    return (
        f"{quantizer.name} weights cannot be divided over devices (ZeRO-3)"
        if zero_stage == 3
        else None
    )


def not_compiled(config: Config) -> str:
    """Why compiled training is refused, by the threshold.

    With outliers dynamo raises `PendingUnbackedSymbolNotFound`: how many columns there are depends
    on the values. Without them a layer is one graph, and exact up to inductor, whose sums differ in
    the last bit: now and then an activation gets the next code. On a Llama miniature in float32
    that put the loss of one batch in twelve off by 4e-4, where the proof of
    `finrepro.training.compilation` allows 1e-5; the others were equal.
    """
    if config.threshold > 0:
        return (
            "int8 has operators whose results' sizes depend on the values, "
            "which torch.compile does not take"
        )
    return (
        "int8 rounds activations to codes, which the last bit of compiled sums can change by one: "
        "too far from eager training"
    )


def encode(weight: "Tensor", config: Config) -> Stored:
    """Quantize a weight of shape (out, in), on its device. bitsandbytes' operator takes float16,
    on a GPU nothing else.
    """
    import torch
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(
        weight.detach().to(torch.float16).contiguous()
    )
    return Stored(codes, scales, weight.dtype, config)


def decode(stored: Stored) -> "Tensor":
    """The weight (out, in) that the codes stand for, in the dtype it had."""
    return _dequantized(stored.codes, stored.scales, stored.dtype)


def linear(stored: Stored, bias: "Tensor | None") -> "nn.Module":
    """A frozen layer around the stored weight; PEFT takes it for the linear layer that it is."""
    import bitsandbytes
    from torch import nn

    out_features, in_features = stored.codes.shape
    layer = _layer_class()(
        in_features,
        out_features,
        bias=bias is not None,
        has_fp16_weights=False,
        threshold=stored.config.threshold,
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Int8Params(
        stored.codes, requires_grad=False, has_fp16_weights=False, SCB=stored.scales
    )
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def loading(config: Config) -> dict[str, Any]:
    """Transformers' BitsAndBytesConfig for such layers."""
    return {"load_in_8bit": True, "llm_int8_threshold": config.threshold}


def layer_bytes(config: Config, inputs: int, outputs: int, dtype_bits: int) -> int:
    """`stored_bytes` of a linear layer's weight, from its size: a byte a weight, a scale a row."""
    return inputs * outputs + 4 * outputs


def stored_bytes(stored: Stored) -> int:
    """Bytes as they lie in memory: codes and row scales."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (stored.codes, stored.scales))


def note(device_type: str) -> str | None:
    """What a reader must know of this quantizer on this device."""
    if device_type == "cuda":
        return None
    return (
        f"int8 on a {device_type} is LLM.int8's arithmetic without its kernels: "
        "no speed of LLM.int8"
    )


def _dequantized(codes: "Tensor", scales: "Tensor", dtype: "dtype") -> "Tensor":
    return codes.to(dtype).mul_(
        scales.mul(1 / 127).unsqueeze(1)
    )  # the product in float32, rounded once


@cache
def _layer_class() -> Any:
    """bitsandbytes' layer, with one forward pass for every mode and device, and nothing of the
    weight but the parameter itself.

    bitsandbytes' own forward pass trains on a CPU with unrounded activations and evaluates with
    rounded ones, warns at each call, keeps the input alive through activation checkpointing, and
    keeps a second reference to the codes that no move to another device follows.
    """
    import bitsandbytes
    import torch
    from bitsandbytes import functional

    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: "Tensor", layer: Any) -> "Tensor":
            ctx.layer = (
                layer  # the frozen weight is looked up again in backward; nothing else is kept
            )
            rows = x.reshape(-1, x.shape[-1])
            threshold, scales = layer.state.threshold, layer.weight.SCB
            codes, magnitudes, outliers = functional.int8_vectorwise_quant(
                rows.to(torch.float16), threshold=threshold
            )
            weight, bias = layer.weight.data, layer.bias
            if threshold > 0:
                y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
                    rows, codes, weight, magnitudes, scales, outliers, bias
                )
            else:
                y = torch.ops.bitsandbytes.int8_scaled_mm.default(
                    codes, weight, magnitudes, scales, bias=bias, dtype=x.dtype
                )
            return y.reshape(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, *upstream: "Tensor") -> tuple["Tensor", None]:
            gradient, layer = upstream[0], ctx.layer
            weight = _dequantized(layer.weight.data, layer.weight.SCB, gradient.dtype)
            return gradient @ weight, None

    class Int8Linear(bitsandbytes.nn.Linear8bitLt):  # type: ignore[misc]
        def forward(self, x: "Tensor") -> "Tensor":
            return Multiply.apply(x, self)

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            scales = self.weight.SCB
            super()._apply(fn, recurse)
            self.weight.SCB = scales.to(
                self.weight.device
            )  # with the codes, and never to another dtype
            return self

    return Int8Linear
