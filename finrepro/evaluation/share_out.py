"""Work on many rows shared out over the ranks of a cell: the batches are those of one rank, each
rank computes every N-th of them.

So a batch is computed in the same way whoever computes it, and the results are the same numbers,
bit for bit, on one rank and on several. Every rank gets all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from finrepro.data import packing
from finrepro.runtime import ranks

Progress = Callable[[int, int], None]  # rows done, rows in all
Result = TypeVar("Result")


def in_step(model: nn.Module) -> bool:
    """Whether every rank has to make the same forward passes: the parameters lie in parts
    (ZeRO-3), and all bring theirs to each pass.
    """
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def share_out(
    batches: Sequence[packing.ExampleIndices],
    compute: Callable[[packing.ExampleIndices], Sequence[Result]],
    *,
    together: bool,
    progress: Progress | None = None,
) -> list[Result]:
    """One result a row, in the order of the rows; `batches` hold each of the rows 0..n-1 once.

    `compute` gives the results of a batch's rows. With `together` a rank that has run out of
    batches computes one again and throws the results away, so that all ranks call `compute` equally
    often. Progress counts what all ranks have done, if they are equally fast.
    """
    rank = ranks.current()
    total = sum(map(len, batches))
    results_by_row: dict[int, Result] = {}
    for first in range(0, len(batches), rank.world_size):
        idle = first + rank.rank >= len(batches)
        if not idle or together:
            rows = batches[-1 if idle else first + rank.rank]
            results = compute(rows)
            if not idle:
                results_by_row.update(zip(rows, results, strict=True))
        if progress:
            progress(sum(map(len, batches[: first + rank.world_size])), total)
    if rank.world_size > 1:
        parts: list[Any] = [None] * rank.world_size
        dist.all_gather_object(parts, results_by_row)
        results_by_row = {row: result for part in parts for row, result in part.items()}
    return [results_by_row[row] for row in range(total)]
