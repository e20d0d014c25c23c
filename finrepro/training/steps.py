"""Which examples make a step, and in which micro-batches."""

from collections.abc import Callable, Iterator, Sequence

from finrepro.catalogue.spec import Train
from finrepro.data import packing
from finrepro.data.batches import COLLATE, Batch, Sample, empty
from finrepro.runtime import ranks

Order = Callable[[int, int, int], packing.Rows]


def steps_from(
    first: int, lengths: Sequence[int], settings: Train, seed: int, order: Order | None = None
) -> Iterator[tuple[int, packing.Rows]]:
    """(step, example indices) from step `first` to the last: any step can be reached without
    replaying those before it.

    `order` is that of data with one of its own (finrepro.data.corpora.windows): step, global batch
    size and seed to rows.
    """
    if order is not None:
        for step in range(first, settings.max_steps):
            yield step, order(step, settings.global_batch_size, seed)
        return
    per_epoch = packing.num_steps(len(lengths), settings.global_batch_size, settings.sort_window)
    epoch, steps = -1, []
    for step in range(first, settings.max_steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            steps = packing.steps_of_epoch(
                lengths, settings.global_batch_size, settings.sort_window, seed, epoch
            )
        yield step, steps[step % per_epoch]


def micro_batches(
    rows: packing.Rows,
    data: Sequence[Sample],
    lengths: Sequence[int],
    settings: Train,
    here: ranks.Ranks,
) -> list[Batch]:
    """This rank's micro-batches of a step; ranks with fewer than the busiest one get empty ones
    to keep step with it.
    """
    lay_out = packing.LAYOUTS[settings.layout]
    parts = [
        lay_out(
            packing.rank_rows(rows, lengths, rank, here.world_size), lengths, settings.max_tokens
        )
        for rank in range(here.world_size)
    ]
    batches = [COLLATE[settings.layout]([data[row] for row in micro]) for micro in parts[here.rank]]
    return batches + [empty()] * (max(map(len, parts)) - len(batches))


def computed_tokens(
    rows: packing.Rows, lengths: Sequence[int], settings: Train, world_size: int
) -> int:
    """Tokens of a step that go through the model, padding included, over all ranks."""
    lay_out = packing.LAYOUTS[settings.layout]
    parts = [packing.rank_rows(rows, lengths, rank, world_size) for rank in range(world_size)]
    micro = [batch for part in parts for batch in lay_out(part, lengths, settings.max_tokens)]
    return packing.computed_tokens(micro, lengths, settings.layout)
