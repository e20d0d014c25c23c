"""About how long a cell takes."""

import os

from finrepro.catalogue.spec import RunSpec
from finrepro.data import files as data
from finrepro.data.corpora import folders as corpora
from finrepro.evidence import store
from finrepro.evidence.place import Place
from finrepro.planning.machine import machine

TOKENS_PER_EXAMPLE = 45  # of the sentiment sets, with a short prompt; only for the estimate of time


FLOPS_PER_THREAD = (
    6e10  # sustained by small fp32 matrices on one core of the machine in docs/log.md
)


FLOPS_PER_GPU = 1.5e14


def estimated_seconds(spec: RunSpec, place: Place) -> float:
    """About how long the cell takes: as long as it took last time in this store, else from its
    FLOPs.
    """
    before = place.store.result(spec.run_id)
    if before and before["status"] == store.DONE:
        return float(before["ended"] - before["started"])
    windows = any(corpora.is_running_text(part.task) for part in spec.train_on.parts)
    tokens = spec.train.max_seq_len if windows else TOKENS_PER_EXAMPLE
    trained = 6 * spec.train.max_steps * spec.train.global_batch_size * tokens
    scored = (
        TOKENS_PER_EXAMPLE
        * (1 + len(spec.stored_as))
        * sum(2 * file.rows for file in _scored_files(spec) if file.rows)
    )
    threads = min(spec.threads, len(os.sched_getaffinity(0)))
    speed = FLOPS_PER_GPU if machine().gpu_bytes else FLOPS_PER_THREAD * threads
    return 3 + spec.model.parameters * (trained + scored) / speed


def _scored_files(spec: RunSpec) -> list[data.File]:
    """The files of the splits that the cell is scored on; a split cut from a larger file is left
    out.
    """
    files = [each.dataset.config.files for each in spec.tasks]
    return [roles[spec.evaluation.split] for roles in files if spec.evaluation.split in roles]
