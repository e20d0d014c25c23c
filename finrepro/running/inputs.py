"""What a cell starts from: its examples, its base with the tokenizer, and the evidence of what they were."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro.catalogue import reader
from finrepro.catalogue.spec import Pretrain, RunSpec
from finrepro.data import files
from finrepro.data.corpora.place import TOKENIZER, block_of, corpus_of, folder_of, is_running_text
from finrepro.data.files import Dataset
from finrepro.data.tokens import tokenizer_digest
from finrepro.errors import EnvironmentFault, Unavailable, UsageError
from finrepro.evidence.place import Place
from finrepro.models import checkpoints
from finrepro.running.feeding import is_fed, missing_reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

    from finrepro.data.arriving.growing import GrowingCorpus, Waiting
    from finrepro.data.batches import Sample
    from finrepro.data.corpora.stream import Corpus
    from finrepro.data.tokens import Encoded

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
    return {name: files.load(choices[name], place.data_dir, tuple(sorted(splits))) for name, splits in wanted.items()}


def training_examples(
    spec: RunSpec, datasets: dict[str, Dataset], tokenizer: "PreTrainedTokenizerFast",
    opened: "dict[str, Corpus | GrowingCorpus]",
) -> "Sequence[Sample]":  # fmt: skip
    """Every training example, encoded, a part after the other; a repeated part stands there as often. Of running text, its windows, from
    what `corpora` has opened."""
    from finrepro.data.tokens import encode

    if any(is_running_text(part.task) for part in spec.train_on.parts):
        return _windows(spec, datasets, tokenizer, opened)
    encoded: list[Encoded] = []
    for part in spec.train_on.parts if spec.train.max_steps else ():
        task, config = part.task.task.module("tasks"), part.task.task.config
        examples = datasets[part.task.dataset.name].splits["train"]
        pairs = [(task.prompt(example, config), task.target(example, config)) for example in examples]
        encoded += encode(tokenizer, pairs, spec.train.max_seq_len, end=True) * part.repeat
    return encoded


def corpora(spec: RunSpec, place: Place, waiting: "Waiting" = lambda _: False) -> "dict[str, Corpus | GrowingCorpus]":
    """Task -> the corpus that the cell is trained on through it; `waiting` is called while one that is being prepared is waited for.

    Raises `Unavailable` when one is not prepared, nor being prepared where that will do, is damaged, was made from something else than its
    entry says, or by another tokenizer than the one that lies with it, or has more tokens than the model has rows.
    """
    from finrepro.data.arriving.growing import open_arriving
    from finrepro.data.corpora.stream import open_corpus
    from finrepro.data.preparing.entries import unlike

    found: dict[str, Corpus | GrowingCorpus] = {}
    for part in spec.train_on.parts if spec.train.max_steps else ():
        if name := corpus_of(part.task):
            folder, rows = folder_of(name, place.data_dir), spec.model.architecture["vocab_size"]
            with of_this_cell():
                reason = missing_reason(spec, part.task, place)
                if folder is None or reason:
                    raise EnvironmentFault(str(reason))
                if is_fed(spec, part.task):
                    corpus = open_arriving(folder, rows, waiting)
                else:
                    corpus = open_corpus(folder, tokenizer_digest(folder / TOKENIZER) or "none", rows)
                if said := unlike(name, corpus.index):
                    raise EnvironmentFault(f"{folder}: {said}")
                corpus.stream()  # every shard is there, and as long as it was
                found[part.task.task.name] = corpus
    return found


def corpora_facts(spec: RunSpec, found: "dict[str, Corpus | GrowingCorpus]") -> dict[str, Any]:
    """What of the corpora goes into a result: the sha256 of the index, or of the shards of an unfinished one that all steps together take
    their windows from, in whichever attempt; source and size."""
    from finrepro.data.arriving.growing import GrowingCorpus

    facts = {name: each.facts() for name, each in found.items() if not isinstance(each, GrowingCorpus)}
    for part in spec.train_on.parts:
        each, block = found.get(part.task.task.name), block_of(part.task)
        if isinstance(each, GrowingCorpus) and block:
            blocks = -(-spec.train.max_steps * spec.train.global_batch_size // block)
            facts[part.task.task.name] = each.facts(blocks * block * spec.train.max_seq_len + 1)
    return facts


def corpora_identity(spec: RunSpec, found: "dict[str, Corpus | GrowingCorpus]") -> dict[str, Any]:
    """What a checkpoint is held to. Of a corpus that may be unfinished it is what it is made from: the same before its end and after."""
    fed = {part.task.task.name: is_fed(spec, part.task) for part in spec.train_on.parts}
    return {name: each.made_from() if fed[name] else each.facts() for name, each in found.items()}


def patience(
    report: "Callable[[dict[str, Any]], None]", stop_requested: "Callable[[], bool]", tend: "Callable[[], bool]"
) -> "Waiting":
    """What is done while text is waited for: say so once, see that somebody prepares it, and stop where that is asked."""
    from finrepro.training.loop import Interrupted

    said: list[str] = []

    def waiting(what: str) -> bool:
        if stop_requested():
            raise Interrupted("stopped while it waited for text; it goes on from its last checkpoint, if there is one")
        if said[-1:] != [what]:
            said.append(what)
            report({"event": "phase", "phase": what})
        return tend()

    return waiting


def _windows(
    spec: RunSpec, datasets: dict[str, Dataset], tokenizer: "PreTrainedTokenizerFast",
    opened: "dict[str, Corpus | GrowingCorpus]",
) -> "Sequence[Sample]":  # fmt: skip
    """Windows of the corpora, mixed as often as their parts are repeated. Raises `UsageError` where a part is no corpus."""
    from finrepro.data.arriving.arriving import ArrivingWindows
    from finrepro.data.corpora.memory import TextStream
    from finrepro.data.corpora.mixture import Mixture
    from finrepro.data.corpora.windows import Windows
    from finrepro.data.tokens import encode

    made: dict[str, Windows] = {}
    for part in spec.train_on.parts if spec.train.max_steps else ():
        task, config = part.task.task.module("tasks"), part.task.task.config
        if not is_running_text(part.task):
            raise UsageError(f"{spec.train_on.name}: {part.task.task.name} is no running text, and mixes with none.")
        if corpus := opened.get(part.task.task.name):
            stream, block = corpus.stream(), block_of(part.task)
            made[part.task.task.name] = (
                ArrivingWindows(stream, spec.train.max_seq_len, block)
                if block
                else Windows(stream, spec.train.max_seq_len)
            )
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
    from finrepro.models.build import load_tokenizer

    with of_this_cell():
        if spec.base_run is not None:
            folder = place.store.run_folder(spec.base_run) / "weights"
            if place.store.result(spec.base_run) is None:
                raise EnvironmentFault(f"the base of {spec.label}, run {spec.base_run}, is not in {place.store.root}.")
            return folder, load_tokenizer(folder), f"run {spec.base_run}"
        model = reader.origin(spec.model)
        if spec.weights == "scratch" and (made_with := corpora(spec, place)):
            folder = next(iter(made_with.values())).folder / TOKENIZER
            return None, load_tokenizer(folder, spec.model), "corpus"
        found = checkpoints.locate(model, place.models_dir)
        if found is None and spec.weights == "pretrained":
            found = checkpoints.fetch(model)
        if found is not None:
            checkpoints.check(model, found)
            return (found if spec.weights == "pretrained" else None), load_tokenizer(found, spec.model), "checkpoint"
    return None, embedded_tokenizer(spec, place), "trained on the embedded text"


def base_facts(spec: RunSpec, place: Place, folder: Path | None) -> dict[str, Any]:
    """What the base was: the run that made it with its maker's digests, or the sha256 of the checkpoint's weights.

    A cell of table 2 is a base as a checkpoint is: made over days, and not again because a line of the source has changed. Its maker is on
    record, and no part of what makes the cell stale.
    """
    if spec.base_run is not None:
        made = (place.store.result(spec.base_run) or {})["environment"]
        digests = {key: made[key] for key in ("source_digest", "lock_digest")}
        facts = {"run_id": spec.base_run, "weights": place.store.weights_digest(spec.base_run)}
        return facts | ({"made_by": digests} if reader.cell_of_table_2(spec.model) else digests)
    with of_this_cell():
        return {"files": checkpoints.digests(folder) if folder else {}}


def embedded_tokenizer(spec: RunSpec, place: Place) -> "PreTrainedTokenizerFast":
    """A tokenizer for a model that brings none: a miniature's own, or a stand-in of fewer tokens for random weights."""
    text = spec.model.pretrain.task if isinstance(spec.model.pretrain, Pretrain) else STAND_IN_TEXT
    size = min(int(spec.model.architecture["vocab_size"]), STAND_IN_VOCABULARY)
    return _trained_tokenizer(text, spec.model.family, size, place.data_dir)


@lru_cache(maxsize=8)
def _trained_tokenizer(text: str, family: str, size: int, data_dir: Path | None) -> "PreTrainedTokenizerFast":
    """Trained once a process, as `model.load_tokenizer` reads once."""
    from finrepro.data.tokens import train_tokenizer

    source = reader.task(text)
    task, config = source.task.module("tasks"), source.task.config
    texts = [task.target(example, config) for example in files.load(source.dataset, data_dir).splits["train"]]
    return train_tokenizer(texts, family, size)
