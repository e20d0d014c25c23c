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
from finrepro.methods.calibration.crossings import Array, Crossings, TauGrid


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


def plateaus(grid: TauGrid, crossings: Crossings) -> Plateaus:
    """Where the entropy of each block is largest along the grid."""
    blocks, size = grid.ordered.shape
    width = grid.last.bit_length()
    events = (crossings.last - crossings.first).sum(1) + 1
    heads = np.cumsum(events) - events  # what stands for a block's first candidate
    keys = _in_order(crossings, blocks, width)
    levels = np.bitwise_and(keys[:-1], 15, dtype=np.intp)  # as in `_counts_after`
    counts = _counts_after(crossings, levels, heads, size).ravel()
    levels += np.arange(0, 16 * len(levels), 16)
    rise = np.diff(_count_logs(size), prepend=0.0)
    fall = rise.take(counts.take(levels))
    levels -= 1
    score = np.append(rise[1:], 0).take(counts.take(levels))
    score -= fall
    score[heads] = 0
    _accumulate(score, score)  # up to a constant of each block
    constant = scores(crossings.first, size) - score.take(heads)
    keys >>= 4
    score[keys[1:] == keys[:-1]] = -np.inf  # between crossings at the same candidate is no state
    best = np.maximum.reduceat(score, heads)
    tied = np.flatnonzero(score == np.repeat(best, events))
    start, following, mask = keys.take(tied), keys.take(tied + 1), (1 << width) - 1
    block = start >> width
    end = np.where(following >> width == block, (following & mask) - 1, grid.last)
    return Plateaus(best + constant, block, start & mask, end)


def _count_logs(size: int) -> Array:
    """Whole numbers in float64: sums over a block, and over a few thousand, stay below 2^53."""
    logs: Array = objectives.count_logs(size, torch.device("cpu")).numpy().astype(np.float64)
    return logs


def _in_order(crossings: Crossings, blocks: int, width: int) -> Array:
    """What happens, in order, as numbers: block, candidate (of `width` bits) and 15 - bound (of
    4). Each block begins with an event at its first candidate, whose 15 - bound is 0, which is
    none; behind all stands a number that is larger.

    Of crossings at one candidate the highest bound comes first, so that no count is ever negative.
    """
    dtype: Any = np.int32 if blocks.bit_length() + width + 4 < 32 else np.int64
    heads = np.arange(blocks, dtype=dtype) << width + 4
    bounds = np.arange(15, 0, -1, dtype=dtype)[:, None]
    keys: Array = np.empty(blocks + len(crossings.pair) + 1, dtype)
    keys[:blocks], keys[-1] = heads, np.iinfo(dtype).max
    between: Array = keys[blocks:-1]
    np.left_shift(crossings.candidate, 4, out=between)
    between += (heads + bounds).ravel().take(crossings.pair)
    keys.sort()
    return keys


def _counts_after(crossings: Crossings, levels: Array, heads: Array, size: int) -> Array:
    """How many weights have each level after each event, the highest level first, (events, 16).
    Event i moves a weight from level `levels[i]` - 1 of these to the one after it.

    The 16 counts are bytes of two words: adding to a word adds to one of them, and none overflows.
    At the head of a block what is added turns the counts of the block before into its own.
    """
    dtype, words = (np.uint8, 2) if size < 256 else (np.uint16, 4)
    starts, ends = (_packed(below, size, dtype) for below in (crossings.first, crossings.last))
    starts[1:] -= ends[:-1]
    units = np.zeros((16, 16), np.int64)
    units[range(1, 16), range(1, 16)], units[range(1, 16), range(15)] = 1, -1
    places = 8 * np.dtype(dtype).itemsize * np.arange(16 // words)
    steps = (units.reshape(16, words, -1) << places).sum(2)
    counts = np.empty((len(levels), words), np.int64)
    for word in range(words):
        step = steps[:, word].copy().take(levels)
        step[heads] = starts[:, word]
        _accumulate(step, counts[:, word])
    return counts.view(dtype)


def _accumulate(values: Array, out: Array) -> None:
    """numpy's cumsum of whole numbers; torch's takes a fifth of its time."""
    torch.cumsum(torch.from_numpy(values), 0, out=torch.from_numpy(out))


def _packed(below: Array, size: int, dtype: Any) -> Array:
    """Counts of levels, the highest first, as words, from how many weights are below each bound."""
    edges = np.pad(below, ((0, 0), (1, 1)))
    edges[:, -1] = size
    counts = np.diff(edges, axis=1)[:, ::-1]
    packed: Array = np.ascontiguousarray(counts, dtype).view(np.int64)
    return packed
