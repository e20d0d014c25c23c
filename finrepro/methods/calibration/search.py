"""The best tau of each block among its candidates.

The candidates are tau = f absmax(w - median) + median for 2 n + 1 factors f, and before them 0
where `fallback` is set. Equal scores go to the smallest |tau| and then to the earlier candidate, or
to the earlier one at once.

`over_grid` looks at every candidate. On a CPU `by_crossings` finds the same tau, to the last bit,
more than ten times faster; blocks that it does not take go to `over_grid`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from finrepro.methods.calibration import crossings, entropy, objectives, squared_error
from finrepro.methods.calibration.crossings import Array, TauGrid

# 1 / ppf(0.9677083): the standard deviation of the normal that NormalFloat4 is made from, where its
# last level is 1
SIGMA = 0.5410872
# What these need lies in a core's cache, and whole numbers stay below 2^53 in float64.
WEIGHTS_AT_ONCE = 2**16


@dataclass(frozen=True)
class Candidates:
    """2 n + 1 candidates, from -range_factor SIGMA to +range_factor SIGMA, and 0 with `fallback`;
    what they are scored by, and who wins of equals.
    """

    n: int
    range_factor: float
    quant_type: str
    objective: objectives.Objective
    fallback: bool
    tie_break: Literal["smallest", "first"]

    @property
    def factors(self) -> list[float]:
        """The factors f in ascending order."""
        reach = self.range_factor * SIGMA
        return [reach * step / self.n for step in range(-self.n, self.n + 1)]


def best_tau(
    blocks: Float[Tensor, "blocks size"], candidates: Candidates
) -> Float[Tensor, " blocks"]:
    """The best tau of each block, not yet rounded, for blocks in float32."""
    if blocks.device.type == "cpu":
        return by_crossings(blocks, candidates)
    return over_grid(blocks, candidates)


def over_grid(
    blocks: Float[Tensor, "blocks size"],
    candidates: Candidates,
    sums: Float[Tensor, "blocks size_and_one"] | None = None,
) -> Float[Tensor, " blocks"]:
    """`best_tau` by the score of every candidate. `sums` are those of `objectives.sums_below`,
    where they are known.
    """
    ordered = blocks.sort(1).values
    median = ordered[:, (blocks.shape[1] - 1) // 2, None]  # the lower of the two, as torch's
    ordered = ordered - median
    factors = torch.tensor(candidates.factors, device=blocks.device)
    shifts = factors * objectives.absmax(ordered, torch.zeros_like(median))
    tau = shifts + median
    if candidates.fallback:
        shifts = torch.cat([-median, shifts], 1)
        tau = torch.cat([torch.zeros_like(median), tau], 1)
    if candidates.objective == "mse" and sums is None:
        sums = objectives.sums_below(ordered)
    levels = objectives.sorted_levels(candidates.quant_type, blocks.device)
    scores = objectives.scores(ordered, shifts, levels, sums)
    best = scores == scores.amax(1, keepdim=True)
    order = tau.abs() if candidates.tie_break == "smallest" else torch.zeros_like(tau)
    winner = order.masked_fill(~best, math.inf).argmin(1, keepdim=True)  # the first of equals
    return tau.gather(1, winner).squeeze(1)


def by_crossings(
    blocks: Float[Tensor, "blocks size"], candidates: Candidates
) -> Float[Tensor, " blocks"]:
    """`best_tau` on a CPU from where the codes change along the grid."""
    ordered = np.sort(blocks.numpy(), axis=1)
    median = ordered[:, (blocks.shape[1] - 1) // 2].copy()
    ordered -= median[:, None]
    largest = np.maximum(ordered[:, -1], -ordered[:, 0])
    levels = objectives.sorted_levels(candidates.quant_type, blocks.device)
    factors = torch.tensor(candidates.factors).numpy()
    middles = objectives.middles(levels).numpy()
    # Of all blocks, whichever are solvable: a matrix product may round by its shape.
    squared = candidates.objective == "mse"
    sums = objectives.sums_below(torch.from_numpy(ordered)) if squared else None
    solvable = crossings.solvable(largest, middles, factors)
    if not solvable.all():
        tau = torch.empty(len(blocks))
        rest = torch.from_numpy(~solvable)
        tau[rest] = over_grid(blocks[rest], candidates, None if sums is None else sums[rest])
        ordered, largest, median = ordered[solvable], largest[solvable], median[solvable]
        sums = None if sums is None else sums[~rest]
    solved = torch.empty(len(ordered))
    pieces = max(1, round(ordered.size / WEIGHTS_AT_ONCE))  # equal ones, without a small rest
    step = max(1, math.ceil(len(ordered) / pieces))
    for start in range(0, len(ordered), step):
        rows = slice(start, start + step)
        grid = TauGrid(ordered[rows], largest[rows], factors, middles)
        solved[rows] = torch.from_numpy(
            _least_entropy_loss(grid, median[rows], candidates)
            if sums is None
            else _least_error(grid, median[rows], candidates, levels, sums[rows])
        )
    if solvable.all():
        return solved
    tau[~rest] = solved
    return tau


def _least_entropy_loss(grid: TauGrid, median: Array, candidates: Candidates) -> Array:
    best = entropy.plateaus(grid, crossings.find(grid))
    block, first, last = best.block, best.start, best.end
    if candidates.tie_break == "smallest":
        # tau ascends along a plateau: the smallest |tau| is where it passes 0, found by division
        # to within one candidate. Plateaus more than two candidates farther from there than
        # another have no smaller one.
        spacing = 2 * grid.reach / grid.last
        passes = (grid.last / 2 - median / (grid.largest * np.float64(spacing))).take(block)
        distance = np.maximum(np.maximum(first - passes, passes - last), 0)
        nearest = np.minimum.reduceat(distance, _heads(block)).take(block)
        near = np.flatnonzero(distance <= nearest + 2)
        block, first, last = block.take(near), first.take(near), last.take(near)
        passes = passes.take(near)
        middle = median.take(block)
        around = np.clip(np.floor(passes), -2, grid.last + 2).astype(np.intp)
        tau = grid.shifts(block, np.clip(around - 1, first, last)) + middle
        for offset in (0, 1, 2):
            later = grid.shifts(block, np.clip(around + offset, first, last)) + middle
            tau = np.where(np.abs(later) < np.abs(tau), later, tau)
    else:
        tau = grid.shifts(block, first) + median.take(block)
    tau = _winner(block, tau, candidates)
    if candidates.fallback:  # 0 comes before all others, and no |tau| is smaller
        size = grid.ordered.shape[1]
        unmoved = entropy.scores(grid.below(-median), size)
        tau[unmoved >= best.best] = 0
    return tau


def _least_error(
    grid: TauGrid, median: Array, candidates: Candidates, levels: Tensor, sums: Tensor
) -> Array:
    block, candidate = squared_error.contenders(
        grid, crossings.find(grid), levels.numpy(), sums.numpy()
    )
    shifts = grid.shifts(block, candidate)
    tau = shifts + median.take(block)
    if candidates.fallback:  # 0 comes before all others of its block
        heads = np.searchsorted(block, np.arange(len(median)))
        block = np.insert(block, heads, np.arange(len(median)))
        shifts, tau = np.insert(shifts, heads, -median), np.insert(tau, heads, 0)
    score = squared_error.exact(grid, block, shifts, levels, sums)
    best = np.maximum.reduceat(score, _heads(block))
    tied = np.flatnonzero(score == best.take(block))
    return _winner(block.take(tied), tau.take(tied), candidates)


def _winner(block: Array, tau: Array, candidates: Candidates) -> Array:
    """Of the tied candidates of each block, in their order, the tau that wins."""
    if candidates.tie_break == "smallest":
        length = np.abs(tau)
        best = np.minimum.reduceat(length, _heads(block)).take(block)
        block, tau = block[length == best], tau[length == best]
    winner: Array = tau.take(_heads(block))
    return winner


def _heads(block: Array) -> Array:
    """Where each block of a list in order begins."""
    return np.flatnonzero(np.diff(block, prepend=-1))
