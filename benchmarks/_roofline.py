"""The least time that a GPU needs for a linear layer, dense or as two factors, from its arithmetic and its memory: no torch, no GPU.

A product (M, K) (K, N) in 16 bits takes max(2 M K N / F, 2 (M K + K N + M N) / B) seconds at F operations and B bytes a second: operands
are read and the result is written once, and nothing stays in a cache (roofline model, Williams et al., 2009).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """`flops` is what large bf16 products reach, not the data sheet's peak; both a second."""

    flops: float
    bytes: float

    @property
    def ridge(self) -> float:
        """Operations a byte from which on the arithmetic is the limit."""
        return self.flops / self.bytes


# Reached: 794.5 TFLOP/s (stas00/ml-engineering, compute/accelerator, at 744d01e: 80.3 % of 989). Memory: the data sheets of the SXM cards.
GPUS = {"H100": Gpu(794.5e12, 3.35e12), "H200": Gpu(794.5e12, 4.8e12)}
WIDTH = 2  # bytes a number


def product_seconds(gpu: Gpu, m: int, k: int, n: int) -> float:
    """Of one matrix product."""
    return max(2 * m * k * n / gpu.flops, WIDTH * (m * k + k * n + m * n) / gpu.bytes)


def dense_seconds(gpu: Gpu, tokens: int, inputs: int, outputs: int) -> float:
    """Of a dense layer's forward pass over so many tokens."""
    return product_seconds(gpu, tokens, inputs, outputs)


def factored_seconds(gpu: Gpu, tokens: int, inputs: int, outputs: int, rank: int, fused: bool = False) -> float:
    """Of two factors, one product after the other; `fused`: in one kernel, which keeps the narrow tensor between them to itself."""
    if not fused:
        return product_seconds(gpu, tokens, inputs, rank) + product_seconds(gpu, tokens, rank, outputs)
    moved = tokens * inputs + tokens * outputs + rank * (inputs + outputs)
    return max(2 * tokens * rank * (inputs + outputs) / gpu.flops, WIDTH * moved / gpu.bytes)


def ceiling(gpu: Gpu, tokens: int, inputs: int, outputs: int, rank: int, fused: bool = False) -> float:
    """How many times faster than the dense layer the factors can be at most; on paper it is in out / (r (in + out))."""
    return dense_seconds(gpu, tokens, inputs, outputs) / factored_seconds(gpu, tokens, inputs, outputs, rank, fused)
