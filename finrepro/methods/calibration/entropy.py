"""The candidates of the largest entropy of every block, from the crossings of its bounds.

At a crossing two of a block's 16 counts change, by one; the entropy between two crossings is
constant. It is summed in whole numbers (`objectives.count_logs`), so that it is that of
`objectives.scores`, however it was reached.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finrepro.methods.calibration import objectives
from finrepro.methods.calibration.crossings import Array, Crossings, Grid


@dataclass(frozen=True)
class Plateaus:
    """The runs of candidates, `start` to `end`, where a block's score is its largest, in order;
    every block has one. `best` is the score, (blocks,).
    """

    best: Array
    block: Array
    start: Array
    end: Array


def scores(counts_below: Array, size: int) -> Array:
    """Score of each block, (blocks,), from how many weights lie below each bound (blocks, 15)."""
    edges = np.pad(counts_below, ((0, 0), (1, 1)))
    edges[:, -1] = size
    total: Array = -_count_logs(size).take(np.diff(edges, axis=1)).sum(1)
    return total


def plateaus(grid: Grid, crossings: Crossings) -> Plateaus:
    """Where the entropy of each block is largest along the grid."""
    blocks, size = grid.ordered.shape
    block, candidate, bound = _in_order(crossings, blocks, grid.last)
    events = np.bincount(block, minlength=blocks)
    heads = np.cumsum(events) - events  # what stands for a block's first candidate
    upto = _counts_upto(crossings.first, bound, heads, events, size).ravel()
    places = np.arange(0, 16 * len(bound), 16)
    places += bound
    here = upto.take(places).astype(np.intp)
    upper = upto.take(np.minimum(places + 1, len(upto) - 1)) - here
    upper += 1
    lower = here - upto.take(places - 1) * (bound > 0)
    rise = np.diff(_count_logs(size), prepend=0.0)
    upper[heads] = lower[heads] = 0
    score = np.cumsum(rise.take(upper) - rise.take(lower))
    score += np.repeat(scores(crossings.first, size) - score.take(heads), events)
    # Between crossings at the same candidate there is no state.
    following = np.append(candidate[1:], 0)
    following[heads[1:] - 1] = following[-1] = grid.last + 1
    score[candidate == following] = -np.inf
    best = np.maximum.reduceat(score, heads)
    tied = np.flatnonzero(score == np.repeat(best, events))
    return Plateaus(best, block.take(tied), candidate.take(tied), following.take(tied) - 1)


def _count_logs(size: int) -> Array:
    """Whole numbers in float64: sums over a block, and over a few thousand, stay below 2^53."""
    logs: Array = objectives.count_logs(size, torch.device("cpu")).numpy().astype(np.float64)
    return logs


def _in_order(crossings: Crossings, blocks: int, last: int) -> tuple[Array, Array, Array]:
    """Block, candidate and bound of what happens, in order: for each block an event at its first
    candidate (its bound is 15, which is none), then its crossings.

    Of crossings at one candidate the highest bound comes first, so that no count is ever negative.
    """
    width = last.bit_length()
    dtype: Any = np.int32 if blocks.bit_length() + width + 4 < 32 else np.int64
    keys: Array = np.empty(len(crossings.bound) + blocks, dtype)
    keys[:blocks] = np.arange(blocks)
    keys[:blocks] <<= width + 4
    rest: Array = keys[blocks:]
    np.left_shift(crossings.block, width, out=rest, dtype=dtype)
    rest |= crossings.candidate
    rest <<= 4
    rest |= 15 - crossings.bound
    keys.sort()
    return keys >> width + 4, keys >> 4 & ((1 << width) - 1), 15 - (keys & 15)


def _counts_upto(first: Array, bound: Array, heads: Array, events: Array, size: int) -> Array:
    """How many weights lie below each bound after each event, (events, 16); the last is the
    block's size.

    The 16 counts of a block are bytes of two words: adding to a word adds to one of them, and
    none overflows within its block.
    """
    dtype, words = (np.uint8, 2) if size < 256 else (np.uint16, 4)
    start = np.full((len(first), 16), size, dtype)
    start[:, :-1] = first
    units = np.eye(16, dtype=dtype)
    units[15] = 0
    upto = np.empty((len(bound), words), np.uint64)
    for word in range(words):
        unit = units.view(np.uint64)[:, word].copy()
        total = np.cumsum(unit.take(bound))
        base = start.view(np.uint64)[:, word] - total.take(heads)
        np.add(total, np.repeat(base, events), out=upto[:, word])
    return upto.view(dtype)
