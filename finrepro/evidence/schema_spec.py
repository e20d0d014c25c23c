"""`spec` in result.json: the settings that decide a run's numbers, and of which its id is the hash
(`RunSpec.canonical`). Names and titles are left out: renaming an entry makes no other run.
"""

from typing import Annotated, Any, NotRequired

from typing_extensions import TypedDict

from finrepro.evidence.described import closed, of


@closed
class ModelSpec(TypedDict):
    """The base model."""

    family: Annotated[str, of("architecture: gpt2 or llama")]
    dtype: Annotated[str, of("dtype of the weights that are not quantized")]
    architecture: Annotated[dict[str, Any], of("arguments of transformers' configuration")]
    low_rank: Annotated[
        dict[str, Any] | None, of("how its linear layers are factored; null: they are dense")
    ]


@closed
class TrainSpec(TypedDict):
    """How it was trained."""

    max_steps: Annotated[int, of("optimizer steps; 0: nothing is trained", "steps")]
    warmup_steps: Annotated[int, of("linear warm-up of the learning rate", "steps")]
    schedule: Annotated[str, of("after the warm-up: constant, linear or cosine")]
    lr: Annotated[float, of("largest learning rate")]
    global_batch_size: Annotated[int, of("in an optimizer step, over all devices", "examples")]
    max_tokens: Annotated[int, of("of a micro-batch with its padding, on a device", "tokens")]
    layout: Annotated[str, of("of micro-batches: padded, bins or fastest")]
    max_seq_len: Annotated[int, of("of an example; longer prompts lose their beginning", "tokens")]
    sort_window: Annotated[int, of("global batches that are sorted by length together", "steps")]
    max_grad_norm: Annotated[float, of("norm to which the gradient is clipped")]
    activation_checkpointing: Annotated[bool, of("whether activations are computed twice")]
    zero_stage: Annotated[int, of("what ZeRO shards over ranks: 0 nothing to 3 parameters")]
    optimizer: Annotated[dict[str, Any], of("its kind and settings")]
    engine: Annotated[str, of("deepspeed, or ddp: torch's own")]
    compile: NotRequired[Annotated[bool, of("whether training is compiled; absent: it is not")]]
    short: Annotated[bool, of("too short to show quality: the run proves its path")]


@closed
class EvaluationSpec(TypedDict):
    """How it was scored."""

    split: Annotated[str, of("the split that is scored: test or development")]
    max_tokens: Annotated[int, of("of a forward pass", "tokens")]
    resamples: Annotated[int, of("of the bootstrap over examples")]
    confidence: Annotated[float, of("level of every interval")]
    seed: Annotated[int, of("of the bootstrap")]


@closed
class Spec(TypedDict):
    """The settings that decide the numbers."""

    model: Annotated[ModelSpec, of("the base model")]
    weights: Annotated[
        str, of("pretrained, random (measured, not judged) or scratch (trained from nothing)")
    ]
    base_checkpoint: Annotated[
        str | None, of("hub id and revision, or package and file's sha256, of the base")
    ]
    base_run: Annotated[str | None, of("id of the run that made the base, where one did")]
    quantizer: Annotated[dict[str, Any], of("its kind and settings")]
    adapter: Annotated[dict[str, Any], of("its kind and settings")]
    train_on: Annotated[
        dict[str, Any], of("`parts`: tasks with their datasets, and how often each is repeated")
    ]
    tasks: Annotated[list[dict[str, Any]], of("tasks that are scored, with their datasets")]
    train: Annotated[TrainSpec, of("how it was trained")]
    evaluation: Annotated[EvaluationSpec, of("how it was scored")]
    seed: Annotated[int, of("of initialisation and order of examples")]
    threads: Annotated[int, of("of a process, on a CPU")]
    world_size: Annotated[int, of("ranks, one a device")]
    stored_as: Annotated[
        list[dict[str, Any]], of("quantizers in which the trained model is scored once more")
    ]
