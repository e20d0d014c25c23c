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
from finrepro.exporting.recorded import Recorded
from finrepro.exporting.verify import NotEqual
from finrepro.settings import plain, without

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLE = 8  # recorded examples
# Between log-probabilities, for those above 1 as a share of them: they were computed in other
# batches, perhaps on another device. int8 rounds a row as the rows beside it decide.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "bnb_int8": 0.1}


def check(
    recorded: Recorded, place: Place, model: Any, tokenizer: "PreTrainedTokenizerFast"
) -> str:
    """What was found, in a line. Raises `NotEqual` when the model gives other log-probabilities
    than the run recorded.
    """
    spec = recorded.spec
    kept = [row for row in read_lines(recorded.folder / "predictions.jsonl") if _logprobs(row)]
    if not kept:
        return "not held against recorded answers: the run has none with log-probabilities"
    rows = [row for row in kept if row["task"] == kept[0]["task"]][:SAMPLE]
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
    again = answer(
        model,
        tokenizer,
        task,
        [examples[row["id"]] for row in rows],
        spec.evaluation,
        spec.train.max_seq_len,
    )
    pairs = [
        pair
        for one, other in zip(rows, again, strict=True)
        for pair in zip(_logprobs(one), _logprobs(other), strict=True)
    ]
    worst = max(abs(one - other) / max(1.0, abs(one)) for one, other in pairs)
    allowed = max(TOLERANCE.get(spec.quantizer.kind, 0.0), TOLERANCE[spec.model.dtype])
    if not worst <= allowed:
        raise NotEqual(
            f"the model made again is not the one that run {recorded.run_id} scored: log-probabilities of recorded answers differ by up to "
            f"{worst:.3g}, allowed is {allowed:g}; use the version that made it (commit "
            f"{recorded.result['environment'].get('git_commit') or 'not recorded'})."
        )
    return f"the model made again gives the log-probabilities of {len(rows)} recorded answers, to {worst:.2g}"


def _logprobs(row: dict[str, Any]) -> list[float]:
    """Of each choice, or of the text; none for an answer that was generated."""
    return (
        list(row["logprobs"].values())
        if "logprobs" in row
        else [row["logprob"]]
        if "logprob" in row
        else []
    )


def _task(recorded: Recorded, name: str) -> TaskSpec | None:
    """The task that the run was scored on; None when the catalogue's is another."""
    for values in recorded.result["spec"]["tasks"]:
        try:
            _, scored = reader.train_set(
                recorded.result["cell"]["train_on"], values["task"].get("template", "")
            )
        except UsageError:
            return None
        for each in scored:
            if each.task.name == name and without(plain(each), DESCRIPTIVE) == values:
                return each
    return None
