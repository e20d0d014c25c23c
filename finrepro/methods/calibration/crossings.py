"""Where a block's codes change along the grid of candidates, on a CPU: where a bound between two
levels passes a weight.

From one candidate to the next each of the 15 bounds b_i(k) = s(k) m_i + shift(k) moves up by (1 +-
m_i) steps of the grid, so that it passes each weight at most once, at a candidate that follows from
a division. A block of 64 has about 66 such crossings over 201 candidates, where the grid has 201 *
15 bounds to be placed among 64 weights.

The crossings are those of the bounds as `objectives` computes them, in float32, to the last bit.
Where rounding could decide, that is where the quotient lies close to a whole number, the bound of
that candidate is computed and compared as there. `solvable` says for which blocks this suffices.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

ULP = 2.0**-24
# Roundings, in units of ULP, that separate a quotient from the candidate at which the computed
# bound passes the weight: 10 in a bound, 20 in the quotient. Doubled.
ROUNDINGS = 60
NORMAL = (2.0**-90, 2.0**90)  # absmax of blocks without subnormal numbers and overflow


@dataclass(frozen=True)
class TauGrid:
    """Blocks of weights in ascending order (blocks, size), less their medians, with the factors
    (candidates,) of their candidates: shift(k) = factors[k] absmax. Float32; the factors are
    evenly spaced around 0 and `reach` is the last.
    """

    ordered: Array
    largest: Array
    factors: Array
    middles: Array

    @property
    def last(self) -> int:
        """The last candidate."""
        return len(self.factors) - 1

    @property
    def reach(self) -> float:
        """The last candidate's shift, in units of absmax."""
        return float(self.factors[-1])

    def shifts(self, block: Array, candidate: Array) -> Array:
        """Shift of each candidate of each block."""
        product: Array = self.factors.take(candidate) * self.largest.take(block)
        return product

    def bounds(self, block: Array, shift: Array, middle: Any) -> Array:
        """The bound of these blocks at this shift."""
        scale = np.maximum(self.ordered[block, -1] - shift, shift - self.ordered[block, 0])
        return scale * middle + shift

    def below(self, shift: Array) -> Array:
        """How many weights lie below each bound, (blocks, 15), at a shift a block."""
        scale = np.maximum(self.ordered[:, -1] - shift, shift - self.ordered[:, 0])
        bounds = scale[:, None] * self.middles + shift[:, None]
        return _counts_below(self.ordered, bounds)


def _counts_below(ordered: Array, bounds: Array) -> Array:
    """torch.searchsorted: how many of each ascending row (rows, size) lie below its bounds (rows,
    bounds). Where sizes are powers of two, all are halved at once, which is twice as fast.
    """
    rows, size = ordered.shape
    if size & (size - 1):
        counts: Array = torch.searchsorted(
            torch.from_numpy(ordered), torch.from_numpy(bounds)
        ).numpy()
        return counts
    values, flat = ordered.ravel(), bounds.ravel()
    begin = np.arange(0, rows * size, size)
    position = np.repeat(begin, bounds.shape[1])
    half = size // 2
    while half:
        position += half * (values[half - 1 :].take(position) < flat)
        half //= 2
    position += values.take(position) < flat
    return position.reshape(bounds.shape) - begin[:, None]


@dataclass(frozen=True)
class Crossings:
    """Which bound passes a weight of which block at which candidate, bound by bound: at the
    candidate before, the weight is not below the bound, at this one it is.

    `first` and `last` (blocks, 15) count the weights below each bound at the first and the last
    candidate; a `pair` is a bound of a block, bound * blocks + block.
    """

    first: Array
    last: Array
    pair: Array
    candidate: Array
    weight: Array

    @property
    def block(self) -> Array:
        """The block of each crossing."""
        blocks, bounds = self.first.shape
        block: Array = np.tile(np.arange(blocks), bounds).take(self.pair)
        return block

    @property
    def bound(self) -> Array:
        """The bound of each crossing."""
        passed = (self.last - self.first).sum(0)
        return np.repeat(np.arange(len(passed)), passed)


def margin(middles: Array, factors: Array) -> float:
    """How close to a whole number a quotient must lie that rounding could decide."""
    reach, spacing = float(factors[-1]), 2 * float(factors[-1]) / (len(factors) - 1)
    return ROUNDINGS * ULP * (1 + reach) / (spacing * (1 - float(np.abs(middles).max())))


def solvable(largest: Array, middles: Array, factors: Array) -> Array:
    """Blocks, of this absmax, whose crossings can be computed by division."""
    enough = margin(middles, factors) < 0.25
    return enough & (largest > NORMAL[0]) & (largest < NORMAL[1])


def find(grid: TauGrid) -> Crossings:
    """All crossings within a grid of `solvable` blocks."""
    blocks, size = grid.ordered.shape
    first = grid.below(grid.largest * grid.factors[0])
    last = grid.below(grid.largest * grid.factors[-1])
    passed = last - first
    per_pair = passed.T.ravel()
    pair = np.repeat(np.arange(len(per_pair)), per_pair)
    begin = (np.arange(blocks) * size + first.T).ravel() - (np.cumsum(per_pair) - per_pair)
    position = begin.take(pair)
    position += np.arange(len(pair))
    weight = grid.ordered.ravel().take(position)
    quotient = _quotients(grid, pair, weight, int(passed[:, grid.middles <= 0].sum()))
    nearest = np.rint(quotient)
    quotient -= nearest
    candidate = nearest.astype(np.int32)
    candidate += quotient >= 0
    close = np.flatnonzero(np.abs(quotient, out=quotient) < margin(grid.middles, grid.factors))
    bound, block = np.divmod(pair.take(close), blocks)
    doubted = np.clip(nearest.take(close).astype(np.int32), 0, grid.last)
    passes = grid.bounds(block, grid.shifts(block, doubted), grid.middles.take(bound))
    candidate[close] = doubted + (weight.take(close) >= passes)
    return Crossings(first, last, pair, candidate, weight)


def _quotients(grid: TauGrid, pair: Array, weight: Array, negative: int) -> Array:
    """Where the bound of each pair passes each weight, in steps of the grid from its first
    candidate; those of the first `negative` weights have a middle of at most 0.

    The bound is (high - shift) m + shift or (shift - low) m + shift, whichever is farther from the
    shift.
    """
    inverse = grid.last / (2 * grid.reach * grid.largest.astype(np.float64))
    middles = grid.middles.astype(np.float64)[:, None]

    def solved(slope: Array, end: Array) -> Array:
        lines = np.empty((len(middles), len(end)), np.complex64)  # for one take
        lines.real, lines.imag = slope * inverse, grid.last / 2 + slope * middles * end * inverse
        line = lines.ravel().take(pair)
        quotient: Array = line.real * weight
        quotient += line.imag
        return quotient

    from_high = solved(1 / (1 - middles), -grid.ordered[:, -1])
    from_low = solved(1 / (1 + middles), grid.ordered[:, 0])
    for half, farther in (
        (slice(negative), np.maximum),
        (slice(negative, None), np.minimum),
    ):
        farther(from_high[half], from_low[half], out=from_high[half])
    return from_high
