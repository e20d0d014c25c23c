"""What a cell is: the catalogues in configs/, resolved into a frozen `RunSpec` whose hash is the run's identity.

This is the only reader of configs/. It imports no torch: cells are listed and planned in well under a second.
"""

import dataclasses
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from finrepro.data import Hub
from finrepro.errors import UsageError, unknown
from finrepro.schema import Choice, build, choose, plain, read_yaml, settings

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "configs"

Scale = Literal["smoke", "paper"]
Weights = Literal["pretrained", "random"]

# Said about a thing, not part of it: these keys are left out of the hash at every depth.
DESCRIPTIVE = frozenset(
    "name title licence embedded hub hub_path path source parameters gated miniature_of pretrain scale".split()
)


@settings
class Train:
    """How a cell is trained. Steps are optimizer steps; `max_tokens` counts a micro-batch's tokens with padding, a device."""

    max_steps: int
    warmup_steps: int
    schedule: Literal["constant", "linear", "cosine"]
    lr: float
    global_batch_size: int  # examples per optimizer step, over all devices
    max_tokens: int
    layout: Literal["padded", "bins"]
    max_seq_len: int  # tokens; longer prompts lose their beginning, never the answer
    sort_window: int  # global batches that are sorted by length together; 1 leaves the random order
    max_grad_norm: float
    activation_checkpointing: bool
    zero_stage: Literal[0, 1, 2, 3]
    optimizer: Any  # an entry with `kind`; a `Choice` once resolved


@settings
class Evaluation:
    """How a cell is scored: the split, `max_tokens` a forward pass, and the bootstrap's resamples, confidence level and seed.

    Everything is tuned on `development`; `test` is scored once per configuration.
    """

    split: Literal["test", "development"]
    max_tokens: int
    resamples: int
    confidence: float
    seed: int


@settings
class Pretrain:
    """The run that makes a miniature's weights: a language-modelling task and how it is trained."""

    task: str
    threads: int
    train: dict[str, Any]
    evaluation: Evaluation


@settings
class Model:
    """A base model. `architecture` holds arguments of the transformers configuration of `family`."""

    name: str
    family: Literal["gpt2", "llama"]
    scale: Scale
    dtype: Literal["float32", "bfloat16"]
    parameters: int
    architecture: dict[str, Any]
    hub: Hub | None = None
    gated: bool = False
    miniature_of: str | None = None
    pretrain: Pretrain | None = None


@settings
class Axes:
    """The values that a table crosses."""

    model: tuple[str, ...]
    quantizer: tuple[str, ...]
    adapter: tuple[str, ...]
    train_on: tuple[str, ...]
    seed: tuple[int, ...]


@settings
class Override:
    """Training settings for the cells whose axis values equal `where`."""

    where: dict[str, str]
    train: dict[str, Any]


@settings
class Grid:
    """A table at one scale. `full` replaces axes under --full; `quick` lists cell labels for --quick."""

    axes: Axes
    template: str
    threads: int
    train: dict[str, Any]
    evaluation: Evaluation
    quick: tuple[str, ...]
    full: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    overrides: tuple[Override, ...] = ()


@settings
class TableFile:
    """One file of configs/tables."""

    title: str
    report: str
    smoke: Grid
    paper: Grid


@settings
class TaskSpec:
    """A task with the dataset it takes its examples from, both resolved."""

    task: Choice
    dataset: Choice


@settings
class RunSpec:
    """Everything that decides a run's numbers. `base_run` is the run that made the base, where one did."""

    model: Model
    weights: Weights
    base_revision: str | None
    base_run: str | None
    quantizer: Choice
    adapter: Choice
    train_on: TaskSpec
    tasks: tuple[TaskSpec, ...]
    train: Train
    evaluation: Evaluation
    seed: int
    threads: int
    world_size: int

    @property
    def label(self) -> str:
        """The cell's name for people; `run_id` is its identity."""
        names = (self.model.name, self.quantizer.name, self.adapter.name, self.train_on.task.name)
        return "-".join((*names, f"s{self.seed}"))

    @property
    def run_id(self) -> str:
        """12 hex digits of sha256 over the canonical form."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def canonical(self) -> dict[str, Any]:
        """The spec as plain values without what only describes: the hash's input, and `spec` in result.json."""
        return without(plain(self), DESCRIPTIVE)


def without(value: Any, keys: frozenset[str]) -> Any:
    """`value` with the mapping entries named in `keys` dropped at every depth."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    return [without(item, keys) for item in value] if isinstance(value, list) else value


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
    return build(Model, {"name": name, **entry("models", name, "model")}, f"models.{name}")


@cache
def adapter(name: str) -> Choice:
    """A resolved entry of adapters.yaml."""
    return choose("adapters", name, entry("adapters", name, "adapter"), f"adapters.{name}")


@cache
def quantizer(name: str, dtype: str) -> Choice:
    """A resolved entry of quantizers.yaml; `compute_dtype: model` becomes the dtype that the model runs in."""
    values = dict(entry("quantizers", name, "quantizer"))
    if values.get("compute_dtype") == "model":
        values["compute_dtype"] = dtype
    return choose("quantizers", name, values, f"quantizers.{name}")


@cache
def dataset(name: str) -> Choice:
    """A resolved entry of datasets.yaml."""
    return choose("datasets", name, entry("datasets", name, "dataset"), f"datasets.{name}")


@cache
def task(name: str, template: str = "") -> TaskSpec:
    """A resolved entry of tasks.yaml with its dataset; a task with templates keeps the chosen one only."""
    values = dict(entry("tasks", name, "task"))
    templates = values.get("templates")
    if templates:
        if template not in templates:
            raise UsageError(f"tasks.{name}: {unknown('template', template, templates)}")
        values |= {"templates": {template: templates[template]}, "template": template}
    resolved = choose("tasks", name, values, f"tasks.{name}")
    return TaskSpec(task=resolved, dataset=dataset(resolved.config.dataset))


def train_settings(values: dict[str, Any], where: str) -> Train:
    """Checked training settings with the optimizer resolved."""
    train = build(Train, values, where)
    resolved = choose("optimizers", "optimizer", train.optimizer, f"{where}.optimizer")
    return build_with(train, optimizer=resolved)


def build_with(train: Train, **changes: Any) -> Train:
    """A copy of `train` with fields replaced, its checks run again by the constructor."""
    values = {name: getattr(train, name) for name in Train.__dataclass_fields__}  # type: ignore[attr-defined]
    return Train(**(values | changes))


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
    return build(TableFile, read_yaml(CONFIGS / "tables" / f"{full_name}.yaml"), f"tables.{full_name}")


def pretraining(base: Model, seed: int = 0) -> RunSpec:
    """The run that makes a miniature's weights, from its own initialisation."""
    recipe = base.pretrain
    if recipe is None:
        raise UsageError(f"models.{base.name}: has no 'pretrain'.")
    text = task(recipe.task)
    return RunSpec(
        model=base,
        weights="random",
        base_revision=None,
        base_run=None,
        quantizer=quantizer("none", base.dtype),
        adapter=adapter("full"),
        train_on=text,
        tasks=(text,),
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
