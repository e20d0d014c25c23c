"""Why a cell's weights or data are missing, each in one line that says what to do; None where they
are available.
"""

import os
from functools import cache
from pathlib import Path

from finrepro.catalogue import reader, resolve
from finrepro.catalogue.spec import Model, RunSpec, TaskSpec
from finrepro.data import files
from finrepro.data.corpora import folders as corpora
from finrepro.data.preparing import underway
from finrepro.data.tokenizer_files import tokenizer_digest
from finrepro.errors import EnvironmentFault
from finrepro.evidence import store
from finrepro.evidence.place import Place
from finrepro.models import checkpoints, packaged


def missing_base(spec: RunSpec, place: Place, ask_hub: bool) -> str | None:
    """Why a model's weights, or the run of table 2 that trains them, are missing; None if they are
    not.
    """
    model, label = reader.origin(spec.model), reader.cell_of_table_2(spec.model)
    if packaged.is_source(spec):
        return packaged.missing_reason(model, place.store.cache)
    if label is None:
        return missing_weights(model, place.models_dir, ask_hub)
    found = place.store.found(str(spec.base_run), weights=True)
    state = found.result["status"] if found.result else found.state
    command = f"invoke reproduce --table 2 --scale {model.scale} --only {label}"
    if state == store.DONE:
        return None
    base = resolve.base_of(spec.model.name)
    devices = f" on {base.world_size} devices" if base and base.world_size > 1 else ""
    return f"its base, a cell of table 2{devices}, is {state}: {command}"


def missing_weights(model: Model, models_dir: Path | None, ask_hub: bool) -> str | None:
    """Why the model's weights are missing or another model's; None if they are neither. With
    `ask_hub`, those that the hub gives count as available.
    """
    reason = checkpoints.missing_reason(model, models_dir)
    if reason and ask_hub:
        unreachable = checkpoints.unreachable_reason(model)
        return f"{reason}; {unreachable}" if unreachable else None
    folder = checkpoints.locate(model, models_dir)
    return reason or (_wrong_checkpoint(model.name, folder) if folder else None)


@cache
def _wrong_checkpoint(name: str, folder: Path) -> str | None:
    """Why the checkpoint in `folder` is not the model's; cached for the cells of a table."""
    try:
        checkpoints.check(reader.model(name), folder)
    except EnvironmentFault as error:
        return str(error)
    return None


def missing_data(spec: RunSpec, place: Place) -> str | None:
    """Why the cell's data are missing, None if they are not: the training splits where it is
    trained, and the split that it is scored on.
    """
    if spec.train.max_steps:
        for part in spec.train_on.parts:
            reason = (
                missing_corpus(spec, part.task, place)
                if corpora.corpus_of(part.task)
                else files.dataset_missing_reason(part.task.dataset, place.data_dir, ("train",))
            )
            if reason:
                return reason
    for scored in spec.tasks:
        reason = files.dataset_missing_reason(
            scored.dataset, place.data_dir, (spec.evaluation.split,)
        )
        if reason:
            return reason
    return None


def unfinished_corpus(spec: RunSpec, place: Place) -> str | None:
    """Which of the cell's corpora is not finished; None if all are."""
    names = [
        corpora.corpus_of(part.task)
        for part in (spec.train_on.parts if spec.train.max_steps else ())
    ]
    reasons = (corpora.unprepared_reason(name, place.data_dir) for name in names if name)
    return next((reason for reason in reasons if reason), None)


def missing_corpus(spec: RunSpec, task: TaskSpec, place: Place) -> str | None:
    """Why the cell cannot be trained on the task's corpus here; None if it can.

    A corpus that is not finished is enough where the task reads it as it arrives, no other is mixed
    with it, and it is being prepared, or the cell itself can prepare it.
    """
    name = corpora.corpus_of(task)
    reason = corpora.unprepared_reason(name, place.data_dir) if name else None
    folder = corpora.folder_of(name, place.data_dir) if name else None
    if reason is None or folder is None or not is_fed(spec, task):
        return reason
    if underway.is_locked(folder):
        return None
    if tokenizer_for(spec, folder, place.models_dir) is None:
        return (
            f"{reason}, or put the tokenizer of {spec.model.name} under --models-dir: "
            "the cell then prepares it itself"
        )
    return None if _writable(folder) else reason


def is_fed(spec: RunSpec, task: TaskSpec) -> bool:
    """Whether the cell can begin before the task's corpus is finished. Corpora that are mixed have
    to be finished: their shares depend on their sizes.
    """
    return corpora.block_of(task) is not None and len(spec.train_on.parts) == 1


def tokenizer_for(spec: RunSpec, folder: Path, models_dir: Path | None) -> Path | None:
    """The folder of the tokenizer that the corpus is prepared with: beside its shards, the
    model's, or that of the model it is compared with; None where there is none.
    """
    if tokenizer_digest(folder / corpora.TOKENIZER) is not None:
        return folder / corpora.TOKENIZER
    models = [reader.origin(spec.model)]
    models += [reader.model(spec.model.compared_with)] if spec.model.compared_with else []
    folders = (checkpoints.tokenizer_folder(model, models_dir) for model in models)
    return next((tokenizer for tokenizer in folders if tokenizer is not None), None)


def _writable(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(existing, os.W_OK)
