"""Estimated time of a cell."""

from finrepro.catalogue.spec import RunSpec
from finrepro.data import files as data
from finrepro.data.corpora import folders as corpora
from finrepro.evidence import store
from finrepro.evidence.place import Place
from finrepro.planning.machine import local_machine

# Of the sentiment sets with a short prompt, taken for every task that is not running text: examples
# are not tokenized to list a plan. Answers of other tasks are longer, and their times too low.
TOKENS_PER_EXAMPLE = 45
FLOPS_PER_THREAD = 6e10  # small fp32 matrices on one core of the machine in docs/log.md
FLOPS_PER_GPU = 1.5e14
START_SECONDS = 3


def estimated_seconds(spec: RunSpec, place: Place) -> float:
    """Estimated seconds of the cell: its last run's in this store, else from its FLOPs."""
    last = place.store.result(spec.run_id)
    if last and last["status"] == store.DONE:
        return float(last["ended"] - last["started"])
    windows = any(corpora.is_running_text(part.task) for part in spec.train_on.parts)
    tokens = spec.train.max_seq_len if windows else TOKENS_PER_EXAMPLE
    trained = 6 * spec.train.max_steps * spec.train.global_batch_size * tokens
    scored = (
        TOKENS_PER_EXAMPLE
        * (1 + len(spec.stored_as))
        * sum(2 * file.rows for file in _scored_files(spec) if file.rows)
    )
    threads = min(spec.threads, local_machine().cores)
    speed = FLOPS_PER_GPU if local_machine().gpu_bytes else FLOPS_PER_THREAD * threads
    return START_SECONDS + spec.model.parameters * (trained + scored) / speed


def _scored_files(spec: RunSpec) -> list[data.File]:
    """The files of the splits that the cell is scored on, without those cut from a larger file."""
    files = [scored.dataset.config.files for scored in spec.tasks]
    return [roles[spec.evaluation.split] for roles in files if spec.evaluation.split in roles]
