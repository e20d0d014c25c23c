"""How good a candidate tau of a block is, from the block's weights in ascending order: the entropy
of its 4-bit codes, or the squared error.

With levels v_0 < ... < v_15 and s = absmax(w - tau), a weight has code i when (w - tau) / s lies
between the middles m_(i-1) and m_i of neighbouring levels. Codes are not written out: how many
weights of a sorted block lie below each bound s m_i + tau says how often each level occurs.
"""

import math
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad

Objective = Literal["entropy", "mse"]


@cache
def sorted_levels(quant_type: str, device: Any) -> Float[Tensor, "16"]:
    """The 16 levels of bitsandbytes' NF4 or FP4 in ascending order."""
    from bitsandbytes import functional

    levels: Tensor = functional.get_4bit_type(quant_type, device=device).sort().values
    return levels


def middles(levels: Float[Tensor, "16"]) -> Float[Tensor, "15"]:
    """What separates neighbouring levels."""
    return (levels[1:] + levels[:-1]) / 2


def absmax(
    ordered: Float[Tensor, "blocks size"], shifts: Float[Tensor, "blocks shifts"]
) -> Float[Tensor, "blocks shifts"]:
    """absmax(w - shift) of sorted blocks."""
    return torch.maximum(ordered[:, -1:] - shifts, shifts - ordered[:, :1])


def sums_below(ordered: Float[Tensor, "blocks size"]) -> Float[Tensor, "blocks size_and_one"]:
    """Sum of the smallest 0, 1, ..., size weights of each block, in float64.

    A matrix product, for torch's cumsum is not deterministic on CUDA.
    """
    size = ordered.shape[1]
    ones = torch.ones(size, size, dtype=torch.float64, device=ordered.device)
    return pad(ordered.double() @ ones.triu(), (1, 0))


def scores(
    ordered: Float[Tensor, "blocks size"],
    shifts: Float[Tensor, "blocks shifts"],
    levels: Float[Tensor, "16"],
    sums: Float[Tensor, "blocks size_and_one"] | None = None,
) -> Tensor:
    """How good each shift is, (blocks, shifts), larger is better, up to a constant of its block.

    Without `sums` it is the entropy, as whole numbers (int64); with them, those of `sums_below`,
    the squared error (float64).
    """
    bounds_of, scale = middles(levels), absmax(ordered, shifts)
    below = torch.zeros(shifts.shape, dtype=torch.int64, device=ordered.device)
    if sums is None:
        total, table = torch.zeros_like(below), count_logs(ordered.shape[1], ordered.device)
    else:
        total, sum_below = torch.zeros_like(below, dtype=torch.float64), sums[:, :1]
    for index, level in enumerate(levels):
        bounds = (
            scale * bounds_of[index] + shifts
            if index < len(bounds_of)
            else torch.full_like(shifts, math.inf)
        )
        upto = torch.searchsorted(ordered, bounds)
        count = upto - below
        if sums is None:
            total -= table[count]
        else:
            # sum (w - v)^2 over a level's weights, v its value, is sum w^2 - 2 v sum w + count v^2;
            # the first is the same for every shift.
            value, sum_upto = (scale * level + shifts).double(), sums.gather(1, upto)
            total += value * (2 * (sum_upto - sum_below) - count * value)
            sum_below = sum_upto
        below = upto
    return total


@cache
def count_logs(size: int, device: Any) -> Int64[Tensor, " size_and_one"]:
    """count log2(count) for 0 ... size, in units of 2^-32 and as whole numbers, so that equal
    entropies are equal in whatever order they are summed.

    Logarithms are summed over prime factors: 2 * 3 log 3 + 3 * 2 log 2 is 6 log 6, and must be
    here.
    """
    logs = [0, 0]
    for count in range(2, size + 1):
        prime = next(factor for factor in range(2, count + 1) if count % factor == 0)
        logs.append(
            logs[prime] + logs[count // prime] if prime < count else round(2**32 * math.log2(prime))
        )
    return torch.tensor([count * log for count, log in enumerate(logs)], device=device)
