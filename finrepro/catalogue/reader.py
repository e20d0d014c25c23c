"""The one reader of configs/: catalogue entries and tables, resolved and checked. It imports no
torch.

Cells are listed and planned in well under a second, and every mistake in a file is one line that
names the file's key.
"""

import dataclasses
import fnmatch
import json
from functools import cache
from typing import Any, get_args

from finrepro import PROJECT, bounds
from finrepro.catalogue.published import Claim, Published, read_claims
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
def entries(name: str) -> dict[str, Any]:
    """Raw entries of configs/<name>.yaml."""
    return read_yaml(CONFIGS / f"{name}.yaml")


def entry(name: str, key: str, noun: str) -> dict[str, Any]:
    """One raw entry. Raises `UsageError` that names the nearest and all of them."""
    by_name = entries(name)
    if key not in by_name:
        raise unknown(noun, key, by_name)
    if not isinstance(by_name[key], dict):
        raise UsageError(f"{name}.{key}: expected a mapping of settings.")
    return by_name[key]


@cache
def model(name: str) -> Model:
    """A resolved entry of models.yaml."""
    entry_model = build(Model, {"name": name, **entry("models", name, "model")}, f"models.{name}")
    if entry_model.low_rank is not None and entry_model.low_rank.of is not None:
        dense, where = model(entry_model.low_rank.of), f"models.{name}.low_rank.of"
        if dense.low_rank is not None or (dense.family, dense.architecture) != (
            entry_model.family,
            entry_model.architecture,
        ):
            raise UsageError(
                f"{where}: {dense.name} is not the dense model of the same architecture."
            )
        if entry_model.pretrain is not None:
            raise UsageError(
                f"{where}: the weights are those of {dense.name}: leave out 'pretrain'."
            )
    return entry_model


def origin(base: Model) -> Model:
    """The entry whose weights a model starts from: itself, or the dense one that it decomposes."""
    return base if base.low_rank is None or base.low_rank.of is None else model(base.low_rank.of)


def cell_of_table_2(base: Model) -> str | None:
    """The label of the cell of table 2 that trains the weights that a model starts from; None
    where they come from a recipe or from the hub.
    """
    recipe_or_label = origin(base).pretrain
    return recipe_or_label if isinstance(recipe_or_label, str) else None


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
    """A resolved entry of tasks.yaml with its dataset; of a task's templates it holds the one
    that is used.
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
    if (corpus := getattr(resolved.config, "corpus", None)) and corpus not in entries("corpora"):
        raise UsageError(f"tasks.{name}.corpus: {unknown('corpus', corpus, entries('corpora'))}")
    return TaskSpec(task=resolved, dataset=dataset(resolved.config.dataset))


@cache
def train_set(name: str, template: str = "") -> tuple[TrainSet, tuple[TaskSpec, ...]]:
    """The training set of a task or of a mix of tasks, by name, and the tasks that are scored."""
    if name not in entries("mixes"):
        if name not in entries("tasks"):
            raise unknown("training set", name, [*entries("tasks"), *entries("mixes")])
        single = task(name, template)
        return TrainSet(name=name, parts=(Part(task=single, repeat=1),)), (single,)
    mix = build(Mix, entry("mixes", name, "mix"), f"mixes.{name}")
    parts = tuple(
        Part(task=task(part, template), repeat=repeat) for part, repeat in mix.parts.items()
    )
    return TrainSet(name=name, parts=parts), tuple(task(scored, template) for scored in mix.tasks)


def train_settings(values: dict[str, Any], where: str) -> Train:
    """Checked training settings with the optimizer resolved: settings with a `kind`, or the name
    of an entry of optimizers.yaml.
    """
    return _train_settings(json.dumps(values, sort_keys=True), where)


@cache
def _train_settings(text: str, where: str) -> Train:
    """Cached: the hundreds of cells of a table have a few different settings."""
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
def claims(name: str) -> dict[str, Claim]:
    """The claims of configs/published/<name>.yaml, by name."""
    return read_claims(read_yaml(CONFIGS / "published" / f"{name}.yaml"), f"published.{name}")


@cache
def tables() -> tuple[str, ...]:
    """The tables that exist, as `table3`."""
    return tuple(sorted(path.stem for path in (CONFIGS / "tables").glob("table*.yaml")))


@cache
def table(name: str) -> TableFile:
    """A checked table file. `name` is `table3` or `3`."""
    full_name = name if name.startswith("table") else f"table{name}"
    if full_name not in tables():
        numbers = [file_name.removeprefix("table") for file_name in tables()]
        raise unknown("table", name, numbers)
    where = f"tables.{full_name}"
    file = build(TableFile, read_yaml(CONFIGS / "tables" / f"{full_name}.yaml"), where)
    if (file.smoke is None, file.paper is None) != (file.computed is not None,) * 2:
        raise UsageError(f"{where}: needs both smoke and paper, or computed alone.")
    if file.open and file.computed:
        raise UsageError(f"{where}.open: a table that is computed has no cells.")
    grids = ((scale, getattr(file, scale)) for scale in get_args(Scale))
    resolved: dict[str, Any] = {scale: _with_entries(cells) for scale, cells in grids if cells}
    file = dataclasses.replace(file, **resolved)
    report = report_of if file.computed is None else computed_report_of
    report(file.report, f"{where}.report")
    if file.beside and file.beside not in tables():
        raise UsageError(f"{where}.beside: {unknown('table', file.beside, tables())}")
    return file


def scales(name: str) -> tuple[Scale, ...]:
    """The scales at which a table has cells; none for one that is computed."""
    file = table(name)
    return tuple(scale for scale in get_args(Scale) if getattr(file, scale) is not None)


def grid(name: str, scale: Scale) -> Grid:
    """The cells of a table at a scale, unresolved. Raises `UsageError` for a table that has
    none, or none at this scale.
    """
    cells: Grid | None = getattr(table(name), scale)
    if cells is None:
        number, others = name.removeprefix("table"), " or ".join(scales(name))
        if not others:
            raise UsageError(f"table {number} is computed from the models' sizes: it has no cells.")
        raise UsageError(f"table {number} has no cells at scale {scale}: give --scale {others}.")
    return cells


def _with_entries(grid: Grid) -> Grid:
    """A grid whose axes of adapters and quantizers say `*_*` and the like for every entry of
    that pattern, in the catalogue's order.
    """
    values = {}
    for axis in ("adapter", "quantizer"):
        # A pattern without a match stays: `checked_grid` refuses it as an unknown name.
        matches = [
            fnmatch.filter(entries(f"{axis}s"), pattern) or [pattern]
            for pattern in getattr(grid.axes, axis)
        ]
        values[axis] = tuple(dict.fromkeys(name for names in matches for name in names))
    return dataclasses.replace(grid, axes=dataclasses.replace(grid.axes, **values))


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
        return dict(bounds.read_json(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}.") from None
