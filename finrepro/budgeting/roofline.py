"""How much faster two narrow matrix products can be than the wide one they replace, on a GPU that
computes and moves bytes at known rates.

The roofline model (Williams, Waterman and Patterson, CACM 2009): a product takes as long as its
operations at the measured matrix rate, or its bytes at the memory's bandwidth, whichever is longer;
nothing is reused from a cache between products. A rank below rate / bandwidth is bound by memory.
"""

from dataclasses import dataclass

from finrepro.budgeting.hardware import Gpu

BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Ceiling:
    """Speed-ups over the dense layer: by operations alone, at most with two products, and with
    both fused into one pass over the input.
    """

    flops: float
    two_products: float
    fused: float


def seconds(gpu: Gpu, rows: int, inner: int, columns: int) -> float:
    """The least time of a (rows, inner) by (inner, columns) product: computing, or reading both
    and writing the result.
    """
    traffic = BYTES * (rows * inner + inner * columns + rows * columns)
    return max(2 * rows * inner * columns / gpu.rate, traffic / gpu.require("bandwidth"))


def factored_seconds(
    gpu: Gpu, inputs: int, outputs: int, rank: int, tokens: int, fused: bool = False
) -> float:
    """The least time of the two factors, one product after the other; `fused`: what stands
    between them stays on the chip.
    """
    if not fused:
        return seconds(gpu, tokens, inputs, rank) + seconds(gpu, tokens, rank, outputs)
    traffic = BYTES * (tokens * (inputs + outputs) + rank * (inputs + outputs))
    return max(
        2 * tokens * rank * (inputs + outputs) / gpu.rate, traffic / gpu.require("bandwidth")
    )


def low_rank(gpu: Gpu, inputs: int, outputs: int, rank: int, tokens: int) -> Ceiling:
    """The ceiling for W (outputs, inputs) replaced by two factors of `rank`, on `tokens` at
    once.
    """
    dense = seconds(gpu, tokens, inputs, outputs)
    two_products, fused = (
        factored_seconds(gpu, inputs, outputs, rank, tokens, fuse) for fuse in (False, True)
    )
    return Ceiling(
        inputs * outputs / (rank * (inputs + outputs)), dense / two_products, dense / fused
    )


def ridge(gpu: Gpu) -> float:
    """Operations a byte above which the GPU computes longer than it moves: about the smallest
    rank that is not bound by memory.
    """
    return gpu.rate / gpu.require("bandwidth")
