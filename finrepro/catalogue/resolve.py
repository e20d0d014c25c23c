"""From a point of a grid to the resolved spec of its cell."""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finrepro.catalogue.compatibility import refusal
from finrepro.catalogue.grid import GridPoint, checked_grid, grid_points
from finrepro.catalogue.reader import (
    adapter,
    cell_of_table_2,
    entries,
    model,
    origin,
    pretraining,
    quantizer,
    train_set,
    train_settings,
)
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import Model, RunSpec, Scale, Weights
from finrepro.catalogue.table_file import Grid, Group
from finrepro.errors import UsageError, unknown
from finrepro.kinds import adapter_of, choose, kind_module
from finrepro.settings import Choice


@dataclass(frozen=True)
class Cell:
    """A `RunSpec` of a table, or the reason why its combination is refused. `base` is the run
    that trains its base model first.
    """

    spec: RunSpec
    refusal: str | None = None
    base: RunSpec | None = None

    @property
    def label(self) -> str:
        """The spec's label."""
        return self.spec.label


EVERY = Group(cells=("*",))  # of a selection that leaves nothing out


@cache
def _pattern(globs: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for several patterns: a table has thousands of labels."""
    return re.compile("|".join(map(fnmatch.translate, globs)))


def matches(globs: tuple[str, ...], label: str) -> bool:
    """Whether any of the patterns fits the label, letter case included."""
    return _pattern(globs).match(label) is not None


def group_of(grid: Grid, selection: Selection, label: str) -> Group | None:
    """The group that a label belongs to; None if this selection does not run it."""
    groups = (
        grid.quick
        if selection.quick
        else ()
        if selection.full or selection.adapter
        else grid.default
    )
    if not groups:
        return EVERY
    return next((group for group in groups if matches(group.cells, label)), None)


def resolve_cells(grid: Grid, selection: Selection, points: Iterable[GridPoint]) -> list[Cell]:
    """As `resolve_cell`, in the order of the points. Those that differ in their seeds alone share
    everything else, which is resolved and checked once.
    """
    resolved: dict[tuple[object, ...], Cell] = {}
    cells = []
    for point in points:
        group = group_of(grid, selection, point.label)
        alike = (*point.names.values(), point.batch, id(group))
        cell = resolved.get(alike)
        if cell is None:
            cell = resolved[alike] = resolve_cell(grid, selection, point)
        elif cell.label != point.label:
            spec = dataclasses.replace(cell.spec, label=point.label, seed=point.seed)
            cell = Cell(spec, cell.refusal, cell.base)
        cells.append(cell)
    return cells


def resolve_cell(grid: Grid, selection: Selection, point: GridPoint) -> Cell:
    """Resolve one combination of catalogue names."""
    names = point.names
    base_model = model(names["model"])
    adapter_choice = (
        foreign_adapter(selection.adapter) if selection.adapter else adapter(names["adapter"])
    )
    trained_on, scored = train_set(names["train_on"], grid.template)
    if grid.scratch and (selection.adapter or selection.weights != "pretrained"):
        flag = "--adapter" if selection.adapter else "--weights"
        raise UsageError(f"table {selection.table} trains from scratch: {flag} does not apply.")
    weights: Weights = "scratch" if grid.scratch else selection.weights
    base = base_of(base_model.name) if weights == "pretrained" else None
    train, devices = _overridden(grid, names)
    if point.batch:
        train |= {"global_batch_size": point.batch}
    if "optimizer" in names:
        train |= {"optimizer": names["optimizer"]}
    group = group_of(grid, selection, point.label)
    if not adapter_of(adapter_choice).trainable_parameters(base_model):
        train |= {"max_steps": 0, "warmup_steps": 0}
    elif group is not None:
        train |= group.train
    spec = RunSpec(
        label=point.label,
        model=base_model,
        weights=weights,
        base_checkpoint=None if grid.scratch else named_weights(origin(base_model)),
        base_run=base.run_id if base else None,
        quantizer=quantizer(names["quantizer"], base_model.dtype),
        adapter=adapter_choice,
        train_on=trained_on,
        tasks=scored if grid.scored else (),
        train=train_settings(train, f"tables.table{selection.table.removeprefix('table')}.train"),
        evaluation=grid.evaluation,
        seed=point.seed,
        threads=grid.threads,
        world_size=selection.world_size or devices,
        stored_as=tuple(quantizer(name, base_model.dtype) for name in grid.stored_as),
    )
    return Cell(
        spec=spec, refusal=refusal(spec), base=None if cell_of_table_2(base_model) else base
    )


def named_weights(base: Model) -> str | None:
    """The weights of a model by name: a repository at a commit, or a package's file by its sha256;
    None where they are trained here.
    """
    if base.hub:
        return f"{base.hub.id}@{base.hub.revision or 'unpinned'}"
    if base.package:
        return f"{base.package.project}=={base.package.version}@sha256:{base.package.file_sha256}"
    return None


@cache
def base_of(name: str) -> RunSpec | None:
    """The run that trains the weights that a model starts from, by its recipe or as a cell of
    table 2; None where they are not trained here.
    """
    trained = origin(model(name))
    label = cell_of_table_2(trained)
    if label is None:
        return pretraining(trained) if trained.pretrain else None
    table = Selection("2")
    points = {point.label: point for point in grid_points(table, trained.scale)}
    if label not in points:
        raise UsageError(
            f"models.{trained.name}.pretrain: {unknown('cell of table 2', label, points)}"
        )
    return resolve_cell(checked_grid("2", trained.scale), table, points[label]).spec


@cache
def foreign_adapter(folder: str) -> Choice:
    """An adapter made elsewhere: a PEFT folder as a choice of the adapter axis, under the
    folder's name.
    """
    name = Path(folder).name
    if name in entries("adapters"):
        raise UsageError(
            f"--adapter {folder}: '{name}' is an adapter of this package; "
            "give the folder another name."
        )
    settings = kind_module("adapters", "peft_folder").from_folder(Path(folder))
    return choose("adapters", name, {"kind": "peft_folder", **settings}, "--adapter")


def _overridden(grid: Grid, names: dict[str, str]) -> tuple[dict[str, Any], int]:
    """The grid's training settings with the overrides that match the names, and the number of
    devices.
    """
    train, devices = dict(grid.train), 1
    for override in grid.overrides:
        if all(matches((pattern,), names[axis]) for axis, pattern in override.where.items()):
            train |= override.train
            devices = override.devices or devices
    return train, devices


def spec_of_label(selection: Selection, scale: Scale, label: str) -> RunSpec:
    """The spec of the selection's cell, or of the base of one, with this label. Raises
    `UsageError` where there is none.
    """
    grid = checked_grid(selection.table, scale)
    points = {point.label: point for point in grid_points(selection, scale)}
    if label in points:
        return resolve_cell(grid, selection, points[label]).spec
    bases = {base.label: base for name in grid.axes.model if (base := base_of(name))}
    if label in bases:
        return bases[label]
    raise unknown("cell", label, [*points, *bases])
