"""The axes of a table, checked and crossed."""

import fnmatch
import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finrepro.catalogue.reader import (
    adapter,
    model,
    optimizer,
    quantizer,
    train_set,
)
from finrepro.catalogue.reader import grid as grid_of
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import Scale, label_of
from finrepro.catalogue.table_file import Grid
from finrepro.errors import UsageError, unknown

AXES = ("model", "quantizer", "adapter", "train_on")  # in the order of a label
WITH_OPTIMIZER = (*AXES, "optimizer")  # the last is not on every table


@dataclass(frozen=True)
class GridPoint:
    """One combination of a grid's axes, by catalogue names."""

    names: dict[str, str]
    seed: int
    batch: int | None
    label: str  # of the cell that it becomes


@cache
def checked_grid(name: str, scale: Scale) -> Grid:
    """The table's grid with every name on its axes in a catalogue, and every override for some
    of them. Raises `UsageError` for another.
    """
    grid = grid_of(name, scale)
    for model_name in grid.axes.model:
        model(model_name)
    for quantizer_name in grid.axes.quantizer:
        quantizer(quantizer_name, "float32")
    for adapter_name in grid.axes.adapter:
        adapter(adapter_name)
    for train_set_name in grid.axes.train_on:
        train_set(train_set_name, grid.template)
    for optimizer_name in grid.axes.optimizer:
        optimizer(optimizer_name)
    where = f"tables.table{name.removeprefix('table')}.overrides.where"
    for axis, pattern in (pair for override in grid.overrides for pair in override.where.items()):
        if axis not in WITH_OPTIMIZER:
            raise UsageError(f"{where}: {unknown('axis', axis, WITH_OPTIMIZER)}")
        values = getattr(grid.axes, axis)
        if not fnmatch.filter(values, pattern):
            raise UsageError(f"{where}: {unknown(axis, pattern, values)}")
    return grid


def grid_points(selection: Selection, scale: Scale) -> tuple[GridPoint, ...]:
    """The axes crossed; `selection` replaces the seeds and the adapters."""
    grid = checked_grid(selection.table, scale)
    # An adapter from elsewhere is scored and not trained: one seed says all.
    own = grid.axes.seed[:1] if selection.adapter else grid.axes.seed
    seeds = selection.seeds or (grid.full.get("seed") if selection.full else None) or own
    adapters = (Path(selection.adapter).name,) if selection.adapter else grid.axes.adapter
    return _crossed(selection.table, scale, adapters, seeds)


@cache
def _crossed(
    name: str, scale: Scale, adapters: tuple[str, ...], seeds: tuple[int, ...]
) -> tuple[GridPoint, ...]:
    """Cached: a table has thousands of points, and several selections cross the same axes."""
    axes = checked_grid(name, scale).axes
    crossed = (
        axes.model,
        axes.quantizer,
        adapters,
        axes.train_on,
        *([axes.optimizer] if axes.optimizer else []),
    )
    points = []
    for names in itertools.product(*crossed):
        by_axis = dict(zip(WITH_OPTIMIZER, names, strict=False))
        for batch, seed in itertools.product(axes.batch or (None,), seeds):
            points.append(GridPoint(by_axis, seed, batch, label_of(names, batch, seed)))
    return tuple(points)
