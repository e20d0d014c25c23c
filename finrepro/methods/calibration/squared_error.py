"""The candidates of the smallest squared error of every block, from the crossings of its bounds.

With P = sum l_i S_i, Q = sum n_i l_i^2 and R = sum n_i l_i over the levels l_i, their weights' sums
S_i and counts n_i, the score of `objectives.scores` is 2 s P + 2 t S - s^2 Q - 2 s t R - t^2 n at
the shift t; a crossing changes P, Q and R. That has the roundings of float64, while the score's
values s l_i + t are rounded to float32: so it names the few candidates which may be the best, and
`objectives.scores` decides between them.
"""

import numpy as np
import torch

from finrepro.methods.calibration import objectives
from finrepro.methods.calibration.crossings import ULP, Array, Crossings, TauGrid


def contenders(
    grid: TauGrid, crossings: Crossings, levels: Array, sums: Array
) -> tuple[Array, Array]:
    """Block and candidate of all that may have the smallest error, in order; `sums` are those of
    `objectives.sums_below`.
    """
    blocks, size = grid.ordered.shape
    shape, value = (blocks, grid.last + 1), levels.astype(np.float64)
    edges = np.pad(crossings.first, ((0, 0), (1, 1)))
    edges[:, -1] = size
    cells = crossings.block.astype(np.intp) * shape[1] + crossings.candidate
    counts = np.diff(edges, axis=1)
    level_sums = np.diff(np.take_along_axis(sums, edges.astype(np.intp), 1), axis=1)

    def along_grid(start: Array, change: Array) -> Array:
        total = np.bincount(cells, change, minlength=blocks * shape[1]).reshape(shape)
        total[:, 0] += start
        return np.cumsum(total, axis=1, out=total)

    step, square = (value[:-1] - value[1:])[crossings.bound], value**2
    p = along_grid(level_sums @ value, step * crossings.weight)
    q = along_grid(counts @ square, (square[:-1] - square[1:])[crossings.bound])
    r = along_grid(counts @ value, step)
    shift = grid.largest[:, None] * grid.factors
    scale = np.maximum(grid.ordered[:, -1:] - shift, shift - grid.ordered[:, :1])
    s, t = scale.astype(np.float64), shift.astype(np.float64)
    score = 2 * (s * p + t * sums[:, -1:]) - s * s * q - 2 * s * t * r - size * t * t
    near = score.max(1) - _tolerance(grid, levels)
    block, candidate = np.nonzero(score >= near[:, None])
    return block, candidate


def _tolerance(grid: TauGrid, levels: Array) -> Array:
    """How far apart two equal scores can be computed, for each block: n_i weights are at most a
    half gap s h from their value, which is off by 2 ULP (s + |t|). Four times that.
    """
    half_gap = float(np.diff(levels).max()) / 2
    reach = 1 + 2 * abs(grid.reach)
    size = grid.ordered.shape[1]
    tolerance: Array = 16 * ULP * size * half_gap * reach**2 * grid.largest.astype(np.float64) ** 2
    return tolerance


def exact(
    grid: TauGrid, block: Array, shifts: Array, levels: torch.Tensor, sums: torch.Tensor
) -> Array:
    """`objectives.scores` of one shift of each of these blocks."""
    rows = torch.from_numpy(block)
    ordered = torch.from_numpy(grid.ordered)[rows]
    score: Array = objectives.scores(
        ordered, torch.from_numpy(shifts)[:, None], levels, sums[rows]
    ).numpy()[:, 0]
    return score
