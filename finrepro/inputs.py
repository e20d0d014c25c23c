"""What a cell starts from: its examples, its base with the tokenizer, and the evidence of what they were."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro import catalogue, data, weights
from finrepro.corpora.place import TOKENIZER, corpus_of, folder_of, is_running_text, missing_reason
from finrepro.data import Dataset
from finrepro.errors import EnvironmentFault, Unavailable, UsageError
from finrepro.place import Place
from finrepro.spec import Pretrain, RunSpec
from finrepro.tokens import tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from finrepro.batches import Sample
    from finrepro.corpora.stream import Corpus
    from finrepro.tokens import Encoded

STAND_IN_TEXT, STAND_IN_VOCABULARY = "tfns_text", 8192


def load_data(spec: RunSpec, place: Place) -> dict[str, Dataset]:
    """Dataset name -> its splits, of everything the cell is trained or scored on; each is read once."""
    wanted: dict[str, set[str]] = {}
    choices = {}
    parts = spec.train_on.parts if spec.train.max_steps else ()
    needed = [(part.task, "train") for part in parts if corpus_of(part.task) is None] + [
        (each, spec.evaluation.split) for each in spec.tasks
    ]
    for each, split in needed:
        wanted.setdefault(each.dataset.name, set()).add(split)
        choices[each.dataset.name] = each.dataset
    return {name: data.load(choices[name], place.data_dir, tuple(sorted(splits))) for name, splits in wanted.items()}


def training_examples(
    spec: RunSpec, datasets: dict[str, Dataset], tokenizer: "PreTrainedTokenizerFast", place: Place
) -> "Sequence[Sample]":
    """Every training example, encoded, a part after the other; a repeated part stands there as often. Of running text, its windows."""
    from finrepro.tokens import encode

    if any(is_running_text(part.task) for part in spec.train_on.parts):
        return _windows(spec, datasets, tokenizer, place)
    encoded: list[Encoded] = []
    for part in spec.train_on.parts if spec.train.max_steps else ():
        task, config = part.task.task.module("tasks"), part.task.task.config
        examples = datasets[part.task.dataset.name].splits["train"]
        pairs = [(task.prompt(example, config), task.target(example, config)) for example in examples]
        encoded += encode(tokenizer, pairs, spec.train.max_seq_len, end=True) * part.repeat
    return encoded


def corpora(spec: RunSpec, place: Place) -> "dict[str, Corpus]":
    """Task -> the prepared corpus that the cell is trained on through it.

    Raises `Unavailable` when one is not prepared, is damaged, was made from something else than its entry says, or by another tokenizer
    than the one that lies with it, or has more tokens than the model has rows.
    """
    from finrepro.corpora.entries import unlike
    from finrepro.corpora.stream import open_corpus

    found = {}
    for part in spec.train_on.parts if spec.train.max_steps else ():
        if name := corpus_of(part.task):
            folder = folder_of(name, place.data_dir)
            with of_this_cell():
                if folder is None or missing_reason(name, place.data_dir):
                    raise EnvironmentFault(str(missing_reason(name, place.data_dir)))
                digest = tokenizer_digest(folder / TOKENIZER) or "none"
                corpus = open_corpus(folder, digest, spec.model.architecture["vocab_size"])
                if reason := unlike(name, corpus.index):
                    raise EnvironmentFault(f"{folder}: {reason}")
                corpus.stream()  # every shard is there, and as long as it was
                found[part.task.task.name] = corpus
    return found


def corpora_facts(found: "dict[str, Corpus]") -> dict[str, Any]:
    """What of the corpora goes into a result: the sha256 of the index, where the text came from, and how much it is."""
    return {
        name: {"index": each.digest, "source": each.index.source, "documents": each.index.splits["train"].documents,
               "tokens": each.index.splits["train"].tokens}
        for name, each in found.items()
    }  # fmt: skip


def _windows(
    spec: RunSpec, datasets: dict[str, Dataset], tokenizer: "PreTrainedTokenizerFast", place: Place
) -> "Sequence[Sample]":
    """Windows of the corpora, mixed as often as their parts are repeated. Raises `UsageError` where a part is no corpus."""
    from finrepro.corpora.memory import TextStream
    from finrepro.corpora.mixture import Mixture
    from finrepro.corpora.windows import Windows
    from finrepro.tokens import encode

    made = {}
    for part in spec.train_on.parts if spec.train.max_steps else ():
        task, config = part.task.task.module("tasks"), part.task.task.config
        if not is_running_text(part.task):
            raise UsageError(f"{spec.train_on.name}: {part.task.task.name} is no running text, and mixes with none.")
        if prepared := corpora(spec, place).get(part.task.task.name):
            made[part.task.task.name] = Windows(prepared.stream(), spec.train.max_seq_len)
            continue
        examples = datasets[part.task.dataset.name].splits["train"]
        texts = encode(tokenizer, [("", task.target(example, config)) for example in examples], sys.maxsize, end=False)
        made[part.task.task.name] = Windows(TextStream(text.ids for text in texts), spec.train.max_seq_len)
    if len(made) <= 1:
        return next(iter(made.values()), [])
    return Mixture(made, {part.task.task.name: part.repeat for part in spec.train_on.parts})


def data_facts(datasets: dict[str, Dataset]) -> dict[str, Any]:
    """Fingerprints of the splits, overlap between them, where their files were, and the files' sha256, by dataset."""
    return {
        key: {name: getattr(dataset, key) for name, dataset in datasets.items()}
        for key in ("fingerprints", "overlap", "origin", "files")
    }


@contextmanager
def of_this_cell() -> Iterator[None]:
    """A fault of the checkpoint or the adapter is the cell's own: the campaign goes on without it."""
    try:
        yield
    except (EnvironmentFault, UsageError) as error:
        raise Unavailable(str(error)) from error


def base(spec: RunSpec, place: Place) -> tuple[Path | None, "PreTrainedTokenizerFast", str]:
    """The base's folder (None: random weights), its tokenizer, and where that comes from.

    Raises `Unavailable` when the run that makes the base, or the checkpoint, is not there or is faulty.
    """
    from finrepro.model import load_tokenizer

    with of_this_cell():
        if spec.base_run is not None:
            folder = place.store.run_folder(spec.base_run) / "weights"
            if place.store.result(spec.base_run) is None:
                raise EnvironmentFault(f"the base of {spec.label}, run {spec.base_run}, is not in {place.store.root}.")
            return folder, load_tokenizer(folder), f"run {spec.base_run}"
        model = catalogue.origin(spec.model)
        if spec.weights == "scratch" and (made_with := corpora(spec, place)):
            folder = next(iter(made_with.values())).folder / TOKENIZER
            return None, load_tokenizer(folder, spec.model), "corpus"
        found = weights.locate(model, place.models_dir)
        if found is None and spec.weights == "pretrained":
            found = weights.fetch(model)
        if found is not None:
            weights.check(model, found)
            return (found if spec.weights == "pretrained" else None), load_tokenizer(found, spec.model), "checkpoint"
    return None, embedded_tokenizer(spec, place), "trained on the embedded text"


def base_facts(spec: RunSpec, place: Place, folder: Path | None) -> dict[str, Any]:
    """What the base was: the run that made it with its maker's digests, or the sha256 of the checkpoint's weights."""
    if spec.base_run is not None:
        made = (place.store.result(spec.base_run) or {})["environment"]
        digests = {key: made[key] for key in ("source_digest", "lock_digest")}
        return {"run_id": spec.base_run, "weights": place.store.weights_digest(spec.base_run), **digests}
    with of_this_cell():
        return {"files": weights.digests(folder) if folder else {}}


def embedded_tokenizer(spec: RunSpec, place: Place) -> "PreTrainedTokenizerFast":
    """A tokenizer for a model that brings none: a miniature's own, or a stand-in of fewer tokens for random weights."""
    text = spec.model.pretrain.task if isinstance(spec.model.pretrain, Pretrain) else STAND_IN_TEXT
    size = min(int(spec.model.architecture["vocab_size"]), STAND_IN_VOCABULARY)
    return _trained_tokenizer(text, spec.model.family, size, place.data_dir)


@lru_cache(maxsize=8)
def _trained_tokenizer(text: str, family: str, size: int, data_dir: Path | None) -> "PreTrainedTokenizerFast":
    """Trained once a process, as `model.load_tokenizer` reads once."""
    from finrepro.tokens import train_tokenizer

    source = catalogue.task(text)
    task, config = source.task.module("tasks"), source.task.config
    texts = [task.target(example, config) for example in data.load(source.dataset, data_dir).splits["train"]]
    return train_tokenizer(texts, family, size)
