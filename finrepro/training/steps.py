"""Which examples make a step, and in which micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from finrepro.catalogue.spec import Train
from finrepro.data import packing
from finrepro.data.batches import COLLATE, Batch, Sample, empty
from finrepro.runtime import ranks

# Step, global batch size and seed -> the indices of the step's examples.
Order = Callable[[int, int, int], packing.ExampleIndices]


@runtime_checkable
class OrderedSamples(Protocol):
    """Examples with an order of their own, whose lengths in tokens are known without reading them:
    windows of running text (finrepro.data.corpora.windows).
    """

    @property
    def lengths(self) -> Sequence[int]:
        """Of every example."""

    def rows(self, step: int, global_batch_size: int, seed: int) -> packing.ExampleIndices:
        """The indices of the examples of a step."""


def lengths_of(data: Sequence[Sample]) -> Sequence[int]:
    """Tokens of every example."""
    return data.lengths if isinstance(data, OrderedSamples) else [len(row.ids) for row in data]


def order_of(data: Sequence[Sample]) -> Order | None:
    """The order of data that have one of their own; None for the others, which are shuffled."""
    return data.rows if isinstance(data, OrderedSamples) else None


def steps_from(
    first: int, lengths: Sequence[int], settings: Train, seed: int, order: Order | None = None
) -> Iterator[tuple[int, packing.ExampleIndices]]:
    """(step, example indices) from step `first` to the last: any step can be reached without
    replaying those before it.

    `order` is that of data with one of their own (`order_of`).
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
    rows: packing.ExampleIndices,
    data: Sequence[Sample],
    lengths: Sequence[int],
    settings: Train,
    rank: ranks.Ranks,
) -> list[Batch]:
    """This rank's micro-batches of a step; ranks with fewer than the busiest one get empty ones
    to keep step with it.
    """
    lay_out = packing.LAYOUTS[settings.layout]
    parts = [
        lay_out(
            packing.rank_rows(rows, lengths, number, rank.world_size), lengths, settings.max_tokens
        )
        for number in range(rank.world_size)
    ]
    batches = [COLLATE[settings.layout]([data[row] for row in micro]) for micro in parts[rank.rank]]
    return batches + [empty()] * (max(map(len, parts)) - len(batches))


def computed_tokens(
    rows: packing.ExampleIndices, lengths: Sequence[int], settings: Train, world_size: int
) -> int:
    """Tokens of a step that go through the model, padding included, over all ranks."""
    lay_out = packing.LAYOUTS[settings.layout]
    parts = [packing.rank_rows(rows, lengths, rank, world_size) for rank in range(world_size)]
    micro = [batch for part in parts for batch in lay_out(part, lengths, settings.max_tokens)]
    return packing.computed_tokens(micro, lengths, settings.layout)
