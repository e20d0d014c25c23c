"""From a table to its cells: the axes crossed, the selection applied, and what cannot be combined named with its reason."""

import difflib
import fnmatch
import itertools
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finrepro.catalogue.compatibility import refusal
from finrepro.catalogue.reader import (
    adapter,
    catalogue,
    cell_of_table_2,
    model,
    optimizer,
    origin,
    pretraining,
    quantizer,
    train_set,
    train_settings,
)
from finrepro.catalogue.reader import grid as grid_of
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import Grid, Group, RunSpec, Scale, Weights, label_of
from finrepro.errors import UsageError, unknown
from finrepro.settings import Choice, choose, kind_module

AXES = ("model", "quantizer", "adapter", "train_on")  # in the order of a label
WITH_OPTIMIZER = (*AXES, "optimizer")  # the last is not on every table


@dataclass(frozen=True)
class Cell:
    """A `RunSpec` of a table, or the reason why its combination is refused. `base` is the run that the campaign makes first."""

    spec: RunSpec
    refusal: str | None = None
    base: RunSpec | None = None

    @property
    def label(self) -> str:
        """The spec's label."""
        return self.spec.label


@dataclass(frozen=True)
class Point:
    """One combination of a grid's axes, by catalogue names."""

    names: dict[str, str]
    seed: int
    batch: int | None
    label: str  # of the cell that it becomes


def expand(selection: Selection, scale: Scale) -> list[Cell]:
    """Every selected cell of the table at `scale`, in the order of the axes. Raises `UsageError` if none is left."""
    grid = _checked_grid(selection.table, scale)
    points = _points(selection, scale)
    only = ("*" if selection.only is None else selection.only,)
    wanted = [point for point in points if _matches(only, point.label)]
    chosen = [point for point in wanted if _group(grid, selection, point.label) is not None]
    if not chosen:
        raise _no_match(selection, [point.label for point in points])
    cells = [_cell(grid, selection, point) for point in chosen]
    fitting = [cell for cell in cells if not cell.refusal]
    return fitting if selection.adapter and fitting else cells  # an adapter from elsewhere is asked for on its own base


@cache
def _checked_grid(name: str, scale: Scale) -> Grid:
    """The table's grid with every name on its axes in a catalogue, and every override for some of them. Raises `UsageError` for another."""
    grid = grid_of(name, scale)
    for each in grid.axes.model:
        model(each)
    for each in grid.axes.quantizer:
        quantizer(each, "float32")
    for each in grid.axes.adapter:
        adapter(each)
    for each in grid.axes.train_on:
        train_set(each, grid.template)
    for each in grid.axes.optimizer:
        optimizer(each)
    where = f"tables.table{name.removeprefix('table')}.overrides.where"
    for axis, pattern in (pair for override in grid.overrides for pair in override.where.items()):
        if axis not in WITH_OPTIMIZER:
            raise UsageError(f"{where}: {unknown('axis', axis, WITH_OPTIMIZER)}")
        values = getattr(grid.axes, axis)
        if not fnmatch.filter(values, pattern):
            raise UsageError(f"{where}: {unknown(axis, pattern, values)}")
    return grid


def _points(selection: Selection, scale: Scale) -> tuple[Point, ...]:
    """The axes crossed; `selection` replaces the seeds and the adapters."""
    grid = _checked_grid(selection.table, scale)
    seeds = selection.seeds or (grid.full.get("seed") if selection.full else None) or grid.axes.seed
    adapters = (Path(selection.adapter).name,) if selection.adapter else grid.axes.adapter
    return _crossed(selection.table, scale, adapters, seeds)


@cache
def _crossed(name: str, scale: Scale, adapters: tuple[str, ...], seeds: tuple[int, ...]) -> tuple[Point, ...]:
    """Thousands of points, made once for however many selections."""
    axes = _checked_grid(name, scale).axes
    named = (axes.model, axes.quantizer, adapters, axes.train_on, *([axes.optimizer] if axes.optimizer else []))
    points = []
    for names in itertools.product(*named):
        called = dict(zip(WITH_OPTIMIZER, names, strict=False))
        for batch, seed in itertools.product(axes.batch or (None,), seeds):
            points.append(Point(called, seed, batch, label_of(names, batch, seed)))
    return tuple(points)


@cache
def _pattern(globs: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for several patterns: a table has thousands of labels."""
    return re.compile("|".join(map(fnmatch.translate, globs)))


def _matches(globs: tuple[str, ...], label: str) -> bool:
    """Whether any of the patterns fits the label, letter case included."""
    return _pattern(globs).match(label) is not None


def _group(grid: Grid, selection: Selection, label: str) -> Group | None:
    """The group that a label belongs to; None if this selection does not run it."""
    groups = grid.quick if selection.quick else () if selection.full or selection.adapter else grid.default
    if not groups:
        return Group(cells=("*",))
    return next((group for group in groups if _matches(group.cells, label)), None)


def _no_match(selection: Selection, labels: list[str]) -> UsageError:
    """Why nothing is selected, with the nearest label."""
    near = difflib.get_close_matches(selection.only or "", labels, n=1, cutoff=0.3)
    hint = f" Nearest: {near[0]}." if near else ""
    if selection.only is None:
        return UsageError(f"no cell of table {selection.table} is left with --quick and these seeds.")
    if not (selection.full or selection.quick) and any(_matches((selection.only,), each) for each in labels):
        return UsageError(
            f"the cells of table {selection.table} that match --only '{selection.only}' are not among its default ones: add --full."
        )
    return UsageError(
        f"no cell of table {selection.table} matches --only '{selection.only}'"
        f"{' with --quick' if selection.quick else ''}.{hint} The pattern is a label with * and ?; "
        "list the labels with: invoke cells"
    )


def _cell(grid: Grid, selection: Selection, point: Point) -> Cell:
    """Resolve one combination of catalogue names."""
    names = point.names
    base_model = model(names["model"])
    chosen = foreign_adapter(selection.adapter) if selection.adapter else adapter(names["adapter"])
    module = chosen.module("adapters")
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
    group = _group(grid, selection, point.label)
    if not module.trainable_parameters(base_model, chosen.config):
        train |= {"max_steps": 0, "warmup_steps": 0}
    elif group is not None:
        train |= group.train
    spec = RunSpec(
        label=point.label,
        model=base_model,
        weights=weights,
        base_checkpoint=f"{hub.id}@{hub.revision or 'unpinned'}"
        if (hub := origin(base_model).hub) and not grid.scratch
        else None,
        base_run=base.run_id if base else None,
        quantizer=quantizer(names["quantizer"], base_model.dtype),
        adapter=chosen,
        train_on=trained_on,
        tasks=scored if grid.scored else (),
        train=train_settings(train, f"tables.table{selection.table.removeprefix('table')}.train"),
        evaluation=grid.evaluation,
        seed=point.seed,
        threads=grid.threads,
        world_size=selection.world_size or devices,
        stored_as=tuple(quantizer(each, base_model.dtype) for each in grid.stored_as),
    )
    return Cell(spec=spec, refusal=refusal(spec), base=None if cell_of_table_2(base_model) else base)


@cache
def base_of(name: str) -> RunSpec | None:
    """The run that makes the weights that a model starts from, by its recipe or as a cell of table 2; None where no run does."""
    trained = origin(model(name))
    label = cell_of_table_2(trained)
    if label is None:
        return pretraining(trained) if trained.pretrain else None
    table = Selection("2")
    points = {point.label: point for point in _points(table, trained.scale)}
    if label not in points:
        raise UsageError(f"models.{trained.name}.pretrain: {unknown('cell of table 2', label, points)}")
    return _cell(_checked_grid("2", trained.scale), table, points[label]).spec


@cache
def foreign_adapter(folder: str) -> Choice:
    """An adapter made elsewhere: a PEFT folder as a choice of the adapter axis, under the folder's name."""
    if Path(folder).name in catalogue("adapters"):
        raise UsageError(
            f"--adapter {folder}: '{Path(folder).name}' is an adapter of this package; give the folder another name."
        )
    module = kind_module("adapters", "peft_folder")
    return choose(
        "adapters", Path(folder).name, {"kind": "peft_folder", **module.from_folder(Path(folder))}, "--adapter"
    )


def _overridden(grid: Grid, names: dict[str, str]) -> tuple[dict[str, Any], int]:
    """The grid's training settings with every override that holds for the names, and the number of devices."""
    train, devices = dict(grid.train), 1
    for override in grid.overrides:
        if all(fnmatch.fnmatchcase(names[axis], pattern) for axis, pattern in override.where.items()):
            train |= override.train
            devices = override.devices or devices
    return train, devices


def find(selection: Selection, scale: Scale, label: str) -> RunSpec:
    """The cell of the selection, or the base of one, that has this label. Raises `UsageError` if none has."""
    grid = _checked_grid(selection.table, scale)
    points = {point.label: point for point in _points(selection, scale)}
    if label in points:
        return _cell(grid, selection, points[label]).spec
    bases = {base.label: base for name in grid.axes.model if (base := base_of(name))}
    if label in bases:
        return bases[label]
    raise unknown("cell", label, [*points, *bases])
