"""From a table to its cells: the axes crossed, the selection applied, and what cannot be combined named with its reason."""

import difflib
import fnmatch
import itertools
from dataclasses import dataclass
from typing import Any

from finrepro.catalogue import adapter, entry, model, pretraining, quantizer, table, task, train_settings
from finrepro.errors import UsageError, unknown
from finrepro.spec import Grid, RunSpec, Scale, Weights

SCALES = ("auto", "smoke", "paper")
WEIGHTS = ("pretrained", "random")
AXES = {"model": "models", "quantizer": "quantizers", "adapter": "adapters", "train_on": "tasks"}  # axis -> catalogue


@dataclass(frozen=True)
class Selection:
    """What of a table is asked for. `seeds` and `only` narrow or replace; `world_size` is devices per cell."""

    table: str
    quick: bool = False
    full: bool = False
    only: str | None = None
    seeds: tuple[int, ...] | None = None
    weights: Weights = "pretrained"
    world_size: int = 1


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


def expand(selection: Selection, scale: Scale) -> list[Cell]:
    """Every selected cell of the table at `scale`, in the order of the axes. Raises `UsageError` if none is left."""
    grid: Grid = getattr(table(selection.table), scale)
    axes = grid.axes
    seeds = selection.seeds or (grid.full.get("seed") if selection.full else None) or axes.seed
    found = [
        _cell(grid, selection, dict(zip(AXES, values, strict=True)), seed)
        for *values, seed in itertools.product(axes.model, axes.quantizer, axes.adapter, axes.train_on, seeds)
    ]
    chosen = [cell for cell in found if not selection.quick or _matches(cell, grid.quick.cells)]
    if selection.only is not None:
        chosen = [cell for cell in chosen if _matches(cell, (selection.only,))]
    if not chosen:
        raise _no_match(selection, [cell.label for cell in found])
    return chosen


def _matches(cell: Cell, patterns: tuple[str, ...]) -> bool:
    """Whether the cell's label matches one of the patterns, with * and ?."""
    return any(fnmatch.fnmatchcase(cell.label, pattern) for pattern in patterns)


def _no_match(selection: Selection, labels: list[str]) -> UsageError:
    """Why nothing is selected, with the nearest label."""
    near = difflib.get_close_matches(selection.only or "", labels, n=1, cutoff=0.3)
    hint = f" Nearest: {near[0]}." if near else ""
    if selection.only is None:
        return UsageError(f"no cell of table {selection.table} is left with --quick and these seeds.")
    return UsageError(
        f"no cell of table {selection.table} matches --only '{selection.only}'"
        f"{' with --quick' if selection.quick else ''}.{hint} The pattern is a label with * and ?; "
        "list the labels with: invoke cells"
    )


def _cell(grid: Grid, selection: Selection, names: dict[str, str], seed: int) -> Cell:
    """Resolve one combination of catalogue names."""
    base_model = model(names["model"])
    trained_on = task(names["train_on"], grid.template)
    base = pretraining(base_model) if base_model.pretrain and selection.weights == "pretrained" else None
    train = dict(grid.train)
    for override in grid.overrides:
        for axis in override.where:
            if axis not in names:
                raise UsageError(f"tables.{selection.table}.overrides.where: {unknown('axis', axis, names)}")
            entry(AXES[axis], override.where[axis], axis)
        if all(names[axis] == value for axis, value in override.where.items()):
            train |= override.train
    if selection.quick:
        train |= grid.quick.train
    spec = RunSpec(
        model=base_model,
        weights=selection.weights,
        base_checkpoint=f"{hub.id}@{hub.revision or 'unpinned'}" if (hub := base_model.hub) else None,
        base_run=base.run_id if base else None,
        quantizer=quantizer(names["quantizer"], base_model.dtype),
        adapter=adapter(names["adapter"]),
        train_on=trained_on,
        tasks=(trained_on,),
        train=train_settings(train, f"tables.table{selection.table.removeprefix('table')}.train"),
        evaluation=grid.evaluation,
        seed=seed,
        threads=grid.threads,
        world_size=selection.world_size,
    )
    refusal = spec.adapter.module("adapters").supports(spec.model, spec.quantizer, spec.train.zero_stage)
    return Cell(spec=spec, refusal=refusal, base=base)


def find(selection: Selection, scale: Scale, label: str) -> RunSpec:
    """The cell of the selection, or the base of one, that has this label. Raises `UsageError` if none has."""
    cells = expand(selection, scale)
    specs = [cell.spec for cell in cells] + [cell.base for cell in cells if cell.base is not None]
    for spec in specs:
        if spec.label == label:
            return spec
    raise unknown("cell", label, [spec.label for spec in specs])


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
