"""Why what a cell is trained from or scored on is not to be had, each in one line that says what
to do; None where it is there.
"""

import os
from functools import cache
from pathlib import Path

from finrepro.catalogue import reader, resolve
from finrepro.catalogue.spec import Model, RunSpec, TaskSpec
from finrepro.data import files
from finrepro.data.corpora import folders as corpora
from finrepro.data.preparing import underway
from finrepro.data.tokens import tokenizer_digest
from finrepro.errors import EnvironmentFault
from finrepro.evidence import store
from finrepro.evidence.place import Place
from finrepro.models import checkpoints


def base_of(spec: RunSpec, place: Place, ask_hub: bool) -> str | None:
    """Why a model's weights, or the run of table 2 that makes them, are not to be had, in one
    line; None if they are.
    """
    model, label = reader.origin(spec.model), reader.cell_of_table_2(spec.model)
    if label is None:
        return weights_of(model, place.models_dir, ask_hub)
    made = place.store.result(str(spec.base_run)) or {"status": "not run"}
    again = f"invoke reproduce --table 2 --scale {model.scale} --only {label}"
    if made["status"] == store.DONE:
        return None
    base = resolve.base_of(spec.model.name)
    devices = f" on {base.world_size} devices" if base and base.world_size > 1 else ""
    return f"its base, a cell of table 2{devices}, is {made['status']}: {again}"


def weights_of(model: Model, models_dir: Path | None, ask_hub: bool) -> str | None:
    """Why the model's weights are not to be had, or not the model's, in one line; None if they
    are.
    """
    reason = checkpoints.missing_reason(model, models_dir)
    if reason and ask_hub:
        unreachable = checkpoints.unreachable_reason(model)
        return f"{reason}; {unreachable}" if unreachable else None
    found = checkpoints.locate(model, models_dir)
    return reason or (_wrong_weights(model.name, found) if found else None)


@cache
def _wrong_weights(name: str, folder: Path) -> str | None:
    """Why the checkpoint in `folder` is not the model, read once for all of a table's cells."""
    try:
        checkpoints.check(reader.model(name), folder)
    except EnvironmentFault as error:
        return str(error)
    return None


def data_of(spec: RunSpec, place: Place) -> str | None:
    """Why the cell's data are not here, None if they are: training splits where it is trained,
    and the split that it is scored on.
    """
    if spec.train.max_steps:
        for part in spec.train_on.parts:
            reason = (
                corpus_missing_reason(spec, part.task, place)
                if corpora.corpus_of(part.task)
                else files.dataset_missing_reason(part.task.dataset, place.data_dir, ("train",))
            )
            if reason:
                return reason
    for each in spec.tasks:
        reason = files.dataset_missing_reason(
            each.dataset, place.data_dir, (spec.evaluation.split,)
        )
        if reason:
            return reason
    return None


def corpora_of(spec: RunSpec, place: Place) -> str | None:
    """Which of the cell's corpora is not finished, None if all are."""
    named = [
        corpora.corpus_of(part.task)
        for part in (spec.train_on.parts if spec.train.max_steps else ())
    ]
    reasons = (corpora.unprepared_reason(name, place.data_dir) for name in named if name)
    return next((reason for reason in reasons if reason), None)


def corpus_missing_reason(spec: RunSpec, task: TaskSpec, place: Place) -> str | None:
    """Why the cell cannot be trained on the task's corpus here, in one line that says what to do;
    None if it can.

    One that is not finished will do where the task reads it as it arrives, alone, and it is being
    prepared or can be by the cell itself.
    """
    name = corpora.corpus_of(task)
    reason = corpora.unprepared_reason(name, place.data_dir) if name else None
    folder = corpora.folder_of(name, place.data_dir) if name else None
    if reason is None or folder is None or not is_fed(spec, task):
        return reason
    if underway.is_locked(folder):
        return None
    if tokenizer_for(spec, folder, place.models_dir) is None:
        return f"{reason}, or put the tokenizer of {spec.model.name} under --models-dir: the cell then prepares it itself"
    return None if _writable(folder) else reason


def is_fed(spec: RunSpec, task: TaskSpec) -> bool:
    """Whether the cell can begin before the task's corpus is finished. Those that are mixed have
    to be: how much each has is asked.
    """
    return corpora.block_of(task) is not None and len(spec.train_on.parts) == 1


def tokenizer_for(spec: RunSpec, folder: Path, models_dir: Path | None) -> Path | None:
    """The tokenizer that the corpus is prepared with: the one beside its shards, the model's, or
    that of the model it is compared with.
    """
    if tokenizer_digest(folder / corpora.TOKENIZER) is not None:
        return folder / corpora.TOKENIZER
    models = [reader.origin(spec.model)]
    models += [reader.model(spec.model.compared_with)] if spec.model.compared_with else []
    found = (checkpoints.tokenizer_folder(each, models_dir) for each in models)
    return next((each for each in found if each is not None), None)


def _writable(folder: Path) -> bool:
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return os.access(there, os.W_OK)
