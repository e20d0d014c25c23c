"""Whether the model made again is the one that was scored: some recorded answers, computed again.

Comparing an export with a model that was made again finds what was written wrongly, and not what
was made wrongly.
"""

from typing import TYPE_CHECKING, Any

from finrepro.catalogue import reader
from finrepro.catalogue.spec import DESCRIPTIVE, TaskSpec
from finrepro.data import files
from finrepro.errors import UsageError
from finrepro.evaluation.evaluate import answer
from finrepro.evidence.files import read_lines
from finrepro.evidence.place import Place
from finrepro.exporting.recorded import RecordedRun
from finrepro.exporting.verify import NotEqual
from finrepro.settings import plain, without

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLE = 8  # recorded examples
# Between log-probabilities, for those above 1 as a share of them: they were computed in other
# batches, perhaps on another device. int8 rounds a row as the rows beside it decide.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "bnb_int8": 0.1}


def check(
    recorded: RecordedRun, place: Place, model: Any, tokenizer: "PreTrainedTokenizerFast"
) -> str:
    """Whether the model gives the log-probabilities that the run recorded, in a line.

    Raises `NotEqual` when it gives others.
    """
    spec = recorded.spec
    answered = [row for row in read_lines(recorded.folder / "predictions.jsonl") if _logprobs(row)]
    if not answered:
        return "not held against recorded answers: the run has none with log-probabilities"
    rows = [row for row in answered if row["task"] == answered[0]["task"]][:SAMPLE]
    task = _task(recorded, rows[0]["task"])
    if task is None:
        return f"not held against recorded answers: the task {rows[0]['task']} is another by now"
    name, split = task.dataset.name, spec.evaluation.split
    if reason := files.dataset_missing_reason(task.dataset, place.data_dir, (split,)):
        return f"not held against recorded answers: {reason}"
    loaded = files.load(task.dataset, place.data_dir, (split,))
    if loaded.fingerprints[split] != recorded.result["data"]["fingerprints"].get(name, {}).get(
        split
    ):
        return f"not held against recorded answers: {name} is not what it was"
    examples = {example.id: example for example in loaded.splits[split]}
    recomputed = answer(
        model,
        tokenizer,
        task,
        [examples[row["id"]] for row in rows],
        spec.evaluation,
        spec.train.max_seq_len,
    )
    pairs = [
        pair
        for row, new_row in zip(rows, recomputed, strict=True)
        for pair in zip(_logprobs(row), _logprobs(new_row), strict=True)
    ]
    worst = max(abs(before - now) / max(1.0, abs(before)) for before, now in pairs)
    allowed = max(TOLERANCE.get(spec.quantizer.kind, 0.0), TOLERANCE[spec.model.dtype])
    if not worst <= allowed:
        raise NotEqual(
            f"the model made again is not the one that run {recorded.run_id} scored: "
            "log-probabilities of recorded answers differ by up to "
            f"{worst:.3g}, allowed is {allowed:g}; use the version that made it (commit "
            f"{recorded.result['environment'].get('git_commit') or 'not recorded'})."
        )
    return (
        f"the model made again gives the log-probabilities of {len(rows)} recorded answers, "
        f"to {worst:.2g}"
    )


def _logprobs(row: dict[str, Any]) -> list[float]:
    """Of each choice, or of the text; none for an answer that was generated."""
    return (
        list(row["logprobs"].values())
        if "logprobs" in row
        else [row["logprob"]]
        if "logprob" in row
        else []
    )


def _task(recorded: RecordedRun, name: str) -> TaskSpec | None:
    """The task that the run was scored on; None when the catalogue's is another."""
    for values in recorded.result["spec"]["tasks"]:
        try:
            _, scored = reader.train_set(
                recorded.result["cell"]["train_on"], values["task"].get("template", "")
            )
        except UsageError:
            return None
        for candidate in scored:
            if candidate.task.name == name and without(plain(candidate), DESCRIPTIVE) == values:
                return candidate
    return None
