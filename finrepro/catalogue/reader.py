"""The one reader of configs/: catalogue entries and tables, resolved and checked. It imports no
torch.

Cells are listed and planned in well under a second, and every mistake in a file is one line that
names the file's key.
"""

import dataclasses
import fnmatch
import json
from functools import cache
from typing import Any

from finrepro import PROJECT
from finrepro.catalogue.published import Published
from finrepro.catalogue.published import read as read_published
from finrepro.catalogue.spec import (
    Mix,
    Model,
    Part,
    Pretrain,
    RunSpec,
    Scale,
    TaskSpec,
    Train,
    TrainSet,
    label_of,
)
from finrepro.catalogue.table_file import Grid, TableFile
from finrepro.errors import UsageError, unknown
from finrepro.kinds import choose, computed_report_of, report_of
from finrepro.settings import Choice, build, read_yaml

CONFIGS = PROJECT / "configs"


@cache
def catalogue(name: str) -> dict[str, Any]:
    """Raw entries of configs/<name>.yaml."""
    return read_yaml(CONFIGS / f"{name}.yaml")


def entry(name: str, key: str, what: str) -> dict[str, Any]:
    """One raw entry; raises `UsageError` naming the known ones."""
    entries = catalogue(name)
    if key not in entries:
        raise unknown(what, key, entries)
    if not isinstance(entries[key], dict):
        raise UsageError(f"{name}.{key}: expected a mapping of settings.")
    return entries[key]


@cache
def model(name: str) -> Model:
    """A resolved entry of models.yaml."""
    found = build(Model, {"name": name, **entry("models", name, "model")}, f"models.{name}")
    if found.low_rank is not None and found.low_rank.of is not None:
        dense, where = model(found.low_rank.of), f"models.{name}.low_rank.of"
        if dense.low_rank is not None or (dense.family, dense.architecture) != (
            found.family,
            found.architecture,
        ):
            raise UsageError(
                f"{where}: {dense.name} is not the dense model of the same architecture."
            )
        if found.pretrain is not None:
            raise UsageError(
                f"{where}: the weights are those of {dense.name}: leave out 'pretrain'."
            )
    return found


def origin(base: Model) -> Model:
    """The entry whose weights a model starts from: itself, or the dense one that it decomposes."""
    return base if base.low_rank is None or base.low_rank.of is None else model(base.low_rank.of)


def cell_of_table_2(base: Model) -> str | None:
    """The label of the cell of table 2 that makes the weights that a model starts from; None
    where a recipe or a hub does.
    """
    made_by = origin(base).pretrain
    return made_by if isinstance(made_by, str) else None


@cache
def adapter(name: str) -> Choice:
    """A resolved entry of adapters.yaml."""
    return choose("adapters", name, entry("adapters", name, "adapter"), f"adapters.{name}")


@cache
def quantizer(name: str, dtype: str) -> Choice:
    """A resolved entry of quantizers.yaml; `compute_dtype: model` becomes the dtype that the
    model runs in.
    """
    values = dict(entry("quantizers", name, "quantizer"))
    if values.get("compute_dtype") == "model":
        values["compute_dtype"] = dtype
    return choose("quantizers", name, values, f"quantizers.{name}")


@cache
def optimizer(name: str) -> Choice:
    """A resolved entry of optimizers.yaml."""
    return choose("optimizers", name, entry("optimizers", name, "optimizer"), f"optimizers.{name}")


@cache
def dataset(name: str) -> Choice:
    """A resolved entry of datasets.yaml."""
    return choose("datasets", name, entry("datasets", name, "dataset"), f"datasets.{name}")


@cache
def task(name: str, template: str = "") -> TaskSpec:
    """A resolved entry of tasks.yaml with its dataset; a task with templates keeps the chosen
    one only.
    """
    values = dict(entry("tasks", name, "task"))
    templates = values.get("templates")
    if templates:
        if not isinstance(templates, dict):
            raise UsageError(f"tasks.{name}.templates: expected a mapping of names to wordings.")
        if template not in templates:
            raise UsageError(f"tasks.{name}: {unknown('template', template, templates)}")
        values |= {"templates": {template: templates[template]}, "template": template}
    resolved = choose("tasks", name, values, f"tasks.{name}")
    if (corpus := getattr(resolved.config, "corpus", None)) and corpus not in catalogue("corpora"):
        raise UsageError(f"tasks.{name}.corpus: {unknown('corpus', corpus, catalogue('corpora'))}")
    return TaskSpec(task=resolved, dataset=dataset(resolved.config.dataset))


@cache
def train_set(name: str, template: str = "") -> tuple[TrainSet, tuple[TaskSpec, ...]]:
    """What the name of a mix or of a task means: the set to train on, and the tasks that are
    scored.
    """
    if name not in catalogue("mixes"):
        if name not in catalogue("tasks"):
            raise unknown("training set", name, [*catalogue("tasks"), *catalogue("mixes")])
        single = task(name, template)
        return TrainSet(name=name, parts=(Part(task=single, repeat=1),)), (single,)
    mix = build(Mix, entry("mixes", name, "mix"), f"mixes.{name}")
    parts = tuple(
        Part(task=task(each, template), repeat=repeat) for each, repeat in mix.parts.items()
    )
    return TrainSet(name=name, parts=parts), tuple(task(each, template) for each in mix.tasks)


def train_settings(values: dict[str, Any], where: str) -> Train:
    """Checked training settings with the optimizer resolved: settings with a `kind`, or the name
    of an entry of optimizers.yaml.
    """
    return _train_settings(json.dumps(values, sort_keys=True), where)


@cache
def _train_settings(text: str, where: str) -> Train:
    """A table's hundreds of cells share a few of them."""
    train = build(Train, json.loads(text), where)
    if isinstance(train.optimizer, str):
        return dataclasses.replace(train, optimizer=optimizer(train.optimizer))
    resolved = choose("optimizers", "optimizer", train.optimizer, f"{where}.optimizer")
    return dataclasses.replace(train, optimizer=resolved)


@cache
def published() -> tuple[Published, ...]:
    """Every value of configs/published."""
    files = sorted((CONFIGS / "published").glob("*.yaml"))
    return tuple(
        value
        for path in files
        for value in read_published(read_yaml(path), f"published.{path.stem}")
    )


@cache
def tables() -> tuple[str, ...]:
    """The tables that exist, as `table3`."""
    return tuple(sorted(path.stem for path in (CONFIGS / "tables").glob("table*.yaml")))


@cache
def table(name: str) -> TableFile:
    """A checked table file. `name` is `table3` or `3`."""
    full_name = name if name.startswith("table") else f"table{name}"
    if full_name not in tables():
        numbers = [known.removeprefix("table") for known in tables()]
        raise unknown("table", name, numbers)
    found = build(
        TableFile, read_yaml(CONFIGS / "tables" / f"{full_name}.yaml"), f"tables.{full_name}"
    )
    if (found.smoke is None, found.paper is None) != (found.computed is not None,) * 2:
        raise UsageError(f"tables.{full_name}: needs both smoke and paper, or computed alone.")
    if found.smoke and found.paper:
        found = dataclasses.replace(
            found, smoke=_with_entries(found.smoke), paper=_with_entries(found.paper)
        )
    report = report_of if found.computed is None else computed_report_of
    report(found.report, f"tables.{full_name}.report")
    if found.beside and found.beside not in tables():
        raise UsageError(f"tables.{full_name}.beside: {unknown('table', found.beside, tables())}")
    return found


def grid(name: str, scale: Scale) -> Grid:
    """The cells of a table at a scale, unresolved. Raises `UsageError` for a table that has
    none.
    """
    found: Grid | None = getattr(table(name), scale)
    if found is None:
        raise UsageError(
            f"table {name.removeprefix('table')} is computed from the models' sizes: it has no cells."
        )
    return found


def _with_entries(grid: Grid) -> Grid:
    """A grid whose axes of adapters and quantizers say `*_*` and the like for every entry of
    that pattern, in the catalogue's order.
    """
    named = {}
    for axis in ("adapter", "quantizer"):
        known = catalogue(f"{axis}s")
        found = [
            fnmatch.filter(known, each) or [each] for each in getattr(grid.axes, axis)
        ]  # no match: unknown, and said later
        named[axis] = tuple(dict.fromkeys(name for each in found for name in each))
    return dataclasses.replace(grid, axes=dataclasses.replace(grid.axes, **named))


def pretraining(base: Model, seed: int = 0) -> RunSpec:
    """The run that makes a miniature's weights, from its own initialisation."""
    recipe = base.pretrain
    if not isinstance(recipe, Pretrain):
        raise UsageError(f"models.{base.name}: has no recipe in 'pretrain'.")
    text, scored = train_set(recipe.task)
    return RunSpec(
        label=label_of((base.name, "none", "full", text.name), None, seed),
        model=base,
        weights="scratch",
        base_checkpoint=None,
        base_run=None,
        quantizer=quantizer("none", base.dtype),
        adapter=adapter("full"),
        train_on=text,
        tasks=scored,
        train=train_settings(recipe.train, f"models.{base.name}.pretrain.train"),
        evaluation=recipe.evaluation,
        seed=seed,
        threads=recipe.threads,
        world_size=1,
    )


def deepspeed_config(zero_stage: int) -> dict[str, Any]:
    """The ZeRO settings of configs/deepspeed for a stage."""
    path = CONFIGS / "deepspeed" / f"zero{zero_stage}.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}.") from None
