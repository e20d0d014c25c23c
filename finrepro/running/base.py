"""The base that a cell starts from, with its tokenizer."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro.catalogue import reader
from finrepro.catalogue.spec import Pretrain, RunSpec
from finrepro.data import files
from finrepro.data.corpora.folders import TOKENIZER
from finrepro.errors import EnvironmentFault, failed_if_faulty, unavailable_if_faulty
from finrepro.evidence.place import Place
from finrepro.evidence.store import Store
from finrepro.kinds import task_of
from finrepro.models import checkpoints, packaged
from finrepro.running.text import open_corpora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


STAND_IN_TEXT, STAND_IN_VOCABULARY = "tfns_text", 8192


def open_base(spec: RunSpec, place: Place) -> tuple[Path | None, "PreTrainedTokenizerFast", str]:
    """The base's folder (None: random weights), its tokenizer, and where that comes from.

    Raises `Unavailable` when the run that makes the base, or the checkpoint, is not there or is
    faulty; `EnvironmentFault` where that is a package, which is part of the installation.
    """
    from finrepro.models.build import load_tokenizer

    if packaged.is_source(spec):
        model = reader.origin(spec.model)
        folder = packaged.converted(model, place.store.cache, place.store.digests.of)
        return folder, load_tokenizer(folder, spec.model), "checkpoint"
    with unavailable_if_faulty():
        if spec.base_run is not None:
            folder = place.store.run_folder(spec.base_run) / "weights"
            if not place.store.check(spec.base_run):
                raise EnvironmentFault(
                    f"the base of {spec.label}, run {spec.base_run}, is not in {place.store.root}."
                )
            return folder, load_tokenizer(folder), f"run {spec.base_run}"
        model = reader.origin(spec.model)
        if spec.weights == "scratch" and (corpora := open_corpora(spec, place)):
            folder = next(iter(corpora.values())).folder / TOKENIZER
            return None, load_tokenizer(folder, spec.model), "corpus"
        checkpoint = checkpoints.locate(model, place.models_dir)
        if checkpoint is None and spec.weights == "pretrained":
            checkpoint = checkpoints.fetch(model)
        if checkpoint is not None:
            checkpoints.check(model, checkpoint)
            weights = checkpoint if spec.weights == "pretrained" else None
            return weights, load_tokenizer(checkpoint, spec.model), "checkpoint"
    return None, embedded_tokenizer(spec, place), "trained on the embedded text"


def base_facts(spec: RunSpec, store: Store, folder: Path | None) -> dict[str, Any]:
    """`data.base` of result.json: the run that made the base with the digests of its source and
    packages, or the sha256 of the checkpoint's weights. Raises `Unavailable` for one that is
    damaged.

    A cell of Table 2 is a base as a checkpoint is: trained over days, and not again because a line
    of the source has changed. Its digests are recorded, and do not make the cell stale.
    """
    with unavailable_if_faulty():
        if spec.base_run is not None:
            environment = store.check(spec.base_run)["environment"]
            digests = {key: environment[key] for key in ("source_digest", "lock_digest")}
            facts = {"run_id": spec.base_run, "weights": store.weights_digest(spec.base_run)}
            return facts | ({"made_by": digests} if reader.cell_of_table_2(spec.model) else digests)
        if folder is None:
            return {"files": {}}
        files = {"files": checkpoints.digests(folder, store.digests.of)}
        return files | ({"package": packaged.source(folder)} if packaged.is_source(spec) else {})


def embedded_tokenizer(spec: RunSpec, place: Place) -> "PreTrainedTokenizerFast":
    """A tokenizer for a model that comes without one: a miniature's own, or for random weights a
    stand-in of fewer tokens.
    """
    text = spec.model.pretrain.task if isinstance(spec.model.pretrain, Pretrain) else STAND_IN_TEXT
    size = min(int(spec.model.architecture["vocab_size"]), STAND_IN_VOCABULARY)
    return _trained_tokenizer(text, spec.model.family, size, place.data_dir)


@lru_cache(maxsize=8)
def _trained_tokenizer(
    text: str, family: str, size: int, data_dir: Path | None
) -> "PreTrainedTokenizerFast":
    """Trained once a process, as `model.load_tokenizer` reads once."""
    from finrepro.data.tokens import train_tokenizer

    source = reader.task(text)
    task = task_of(source.task)
    with failed_if_faulty():
        examples = files.load(source.dataset, data_dir).splits["train"]
    texts = [task.target(example) for example in examples]
    return train_tokenizer(texts, family, size)
