"""From a table to its cells: the axes crossed, the selection applied, and what cannot be combined named with its reason."""

import difflib
import fnmatch
import itertools
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finrepro.catalogue import adapter, catalogue, model, pretraining, quantizer, train_set, train_settings
from finrepro.catalogue import grid as grid_of
from finrepro.errors import UsageError, unknown
from finrepro.schema import Choice, choose, kind_module
from finrepro.spec import Grid, Group, RunSpec, Scale, Weights, label_of

SCALES = ("auto", "smoke", "paper")
WEIGHTS = ("pretrained", "random")
AXES = ("model", "quantizer", "adapter", "train_on")  # in the order of a label


@dataclass(frozen=True)
class Selection:
    """What of a table is asked for. `seeds`, `only` and `adapter` (a PEFT folder) narrow or replace; `world_size` is devices per cell, None
    where the table decides."""

    table: str
    quick: bool = False
    full: bool = False
    only: str | None = None
    seeds: tuple[int, ...] | None = None
    weights: Weights = "pretrained"
    world_size: int | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Cell:
    """A `RunSpec` of a table, or the reason why its combination is refused. `base` is the run that has to come first."""

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
    """The table's grid with every name on its axes in a catalogue. Raises `UsageError` for another."""
    grid = grid_of(name, scale)
    for each in grid.axes.model:
        model(each)
    for each in grid.axes.quantizer:
        quantizer(each, "float32")
    for each in grid.axes.adapter:
        adapter(each)
    for each in grid.axes.train_on:
        train_set(each, grid.template)
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
    crossed = itertools.product(axes.model, axes.quantizer, adapters, axes.train_on, axes.batch or (None,), seeds)
    return tuple(
        Point(dict(zip(AXES, names, strict=True)), seed, batch, label_of(names, batch, seed))
        for *names, batch, seed in crossed
    )


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
    base = _base(base_model.name) if base_model.pretrain and selection.weights == "pretrained" else None
    train, devices = _overridden(grid, selection, names)
    if point.batch:
        train |= {"global_batch_size": point.batch}
    group = _group(grid, selection, point.label)
    if not module.trainable_parameters(base_model, chosen.config):
        train |= {"max_steps": 0, "warmup_steps": 0}
    elif group is not None:
        train |= group.train
    spec = RunSpec(
        label=point.label,
        model=base_model,
        weights=selection.weights,
        base_checkpoint=f"{hub.id}@{hub.revision or 'unpinned'}" if (hub := base_model.hub) else None,
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
    )
    return Cell(spec=spec, refusal=refusal(spec), base=base)


def refusal(spec: RunSpec) -> str | None:
    """Why the combination cannot run anywhere, None if it can."""
    stage = spec.train.zero_stage
    if not spec.train.max_steps and len(spec.train_on.parts) > 1:
        return "an untrained model is scored on each task of a mix by itself"
    storable = getattr(spec.quantizer.module("quantizers"), "supports", None)
    reason: str | None = storable(spec.model, spec.quantizer, stage) if storable else None
    choice, module = spec.adapter, spec.adapter.module("adapters")
    reason = reason or module.supports(spec.model, spec.quantizer, stage, choice.config)
    trainable = getattr(module, "supports_training", None)
    return reason or (trainable(spec.train, choice.config) if trainable else None)


@cache
def _base(name: str) -> RunSpec:
    return pretraining(model(name))


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


def _overridden(grid: Grid, selection: Selection, names: dict[str, str]) -> tuple[dict[str, Any], int]:
    """The grid's training settings with every override that holds for the names, and the number of devices."""
    train, devices = dict(grid.train), 1
    where = f"tables.table{selection.table.removeprefix('table')}.overrides.where"
    for override in grid.overrides:
        for axis, pattern in override.where.items():
            if axis not in AXES:
                raise UsageError(f"{where}: {unknown('axis', axis, AXES)}")
            values = getattr(grid.axes, axis)
            if not fnmatch.filter(values, pattern):
                raise UsageError(f"{where}: {unknown(axis, pattern, values)}")
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
    bases = {base.label: base for name in grid.axes.model if model(name).pretrain for base in (_base(name),)}
    if label in bases:
        return bases[label]
    raise unknown("cell", label, [*points, *bases])


def parse_seeds(text: str | None) -> tuple[int, ...] | None:
    """`0,1,2` as numbers. Raises `UsageError` on anything else."""
    if text is None:
        return None
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--seeds '{text}': expected whole numbers separated by commas, as 0,1,2.") from None
    if any(not 0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) != len(seeds):
        raise UsageError(f"--seeds '{text}': each seed is a different number from 0 to {2**32 - 1}.")
    return seeds


def parse_choice(name: str, value: str, allowed: tuple[str, ...]) -> Any:
    """`value` if it is one of `allowed`, else `UsageError` with the nearest match."""
    if value not in allowed:
        raise unknown(f"--{name}", value, allowed)
    return value
