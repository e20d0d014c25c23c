"""Running text that a cell is trained on."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finrepro.catalogue.spec import RunSpec
from finrepro.data.corpora.folders import TOKENIZER, block_of, corpus_of, folder_of, is_running_text
from finrepro.data.files import Dataset
from finrepro.data.tokenizer_files import tokenizer_digest, version_of
from finrepro.errors import EnvironmentFault, Interrupted, UsageError, unavailable_if_faulty
from finrepro.evidence.place import Place
from finrepro.kinds import task_of
from finrepro.planning.availability import is_fed, missing_corpus
from finrepro.running.events import Emit, emit_phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

    from finrepro.data.arriving.growing import GrowingCorpus, Waiting
    from finrepro.data.batches import Sample
    from finrepro.data.corpora.stream import Corpus


def open_corpora(
    spec: RunSpec, place: Place, waiting: "Waiting" = lambda _: False
) -> "dict[str, Corpus | GrowingCorpus]":
    """Task -> the corpus that the cell is trained on through it; `waiting` is called while one that
    is being prepared is waited for.

    Raises `Unavailable` when one is not prepared, nor being prepared where that will do, is
    damaged, was made from something else than its entry says, or by another tokenizer than the one
    that lies with it, or has more tokens than the model has rows.
    """
    from finrepro.data.arriving.growing import open_arriving
    from finrepro.data.corpora.index import read_index
    from finrepro.data.corpora.stream import Corpus, open_corpus
    from finrepro.data.preparing.entries import mismatch
    from finrepro.data.preparing.verify import shard_faults

    corpora: dict[str, Corpus | GrowingCorpus] = {}
    for part in spec.train_on.parts if spec.train.max_steps else ():
        if name := corpus_of(part.task):
            folder, rows = folder_of(name, place.data_dir), spec.model.architecture["vocab_size"]
            with unavailable_if_faulty():
                reason = missing_corpus(spec, part.task, place)
                if folder is None or reason:
                    raise EnvironmentFault(str(reason))
                if is_fed(spec, part.task):
                    corpus = open_arriving(folder, rows, waiting)
                else:
                    digest = tokenizer_digest(
                        folder / TOKENIZER, version_of(read_index(folder).tokenizer)
                    )
                    corpus = open_corpus(folder, digest or "none", rows)
                if isinstance(corpus, Corpus) and (
                    faults := shard_faults(folder, corpus.index, "train", place.store.digests.of)
                ):
                    raise EnvironmentFault(f"{folder}: it is damaged: {faults[0]}")
                if difference := mismatch(name, corpus.index):
                    raise EnvironmentFault(f"{folder}: {difference}")
                corpus.stream()  # every shard is there, and as long as it was
                corpora[part.task.task.name] = corpus
    return corpora


def corpora_facts(spec: RunSpec, corpora: "dict[str, Corpus | GrowingCorpus]") -> dict[str, Any]:
    """What of the corpora goes into a result, by task: source, size and the sha256 of the index, or
    of an unfinished one of those shards that the steps of all attempts take their windows from.
    """
    from finrepro.data.arriving.growing import GrowingCorpus

    facts = {
        name: corpus.facts()
        for name, corpus in corpora.items()
        if not isinstance(corpus, GrowingCorpus)
    }
    for part in spec.train_on.parts:
        growing, block = corpora.get(part.task.task.name), block_of(part.task)
        if isinstance(growing, GrowingCorpus) and block:
            blocks = -(-spec.train.max_steps * spec.train.global_batch_size // block)
            facts[part.task.task.name] = growing.facts(blocks * block * spec.train.max_seq_len + 1)
    return facts


def corpora_identity(spec: RunSpec, corpora: "dict[str, Corpus | GrowingCorpus]") -> dict[str, Any]:
    """What a checkpoint is held to. Of a corpus that may be unfinished it is what it is made
    from: the same before its end and after.
    """
    fed = {part.task.task.name: is_fed(spec, part.task) for part in spec.train_on.parts}
    return {
        name: corpus.made_from() if fed[name] else corpus.facts()
        for name, corpus in corpora.items()
    }


def while_waiting(
    emit: Emit, stop_requested: "Callable[[], bool]", keep_alive: "Callable[[], bool]"
) -> "Waiting":
    """What a reader calls while it waits for text: emits the phase once, and restarts the process
    that prepares the text where it has gone. Raises `Interrupted` when a stop was requested.
    """
    phases: list[str] = []

    def waiting(phase: str) -> bool:
        if stop_requested():
            raise Interrupted(
                "stopped while it waited for text; it goes on from its last checkpoint, if there "
                "is one"
            )
        if phases[-1:] != [phase]:
            phases.append(phase)
            emit_phase(emit, phase)
        return keep_alive()

    return waiting


def windows_of(
    spec: RunSpec,
    datasets: dict[str, Dataset],
    tokenizer: "PreTrainedTokenizerFast",
    corpora: "dict[str, Corpus | GrowingCorpus]",
) -> "Sequence[Sample]":
    """Windows of the corpora, mixed as often as their parts are repeated. Raises `UsageError`
    where a part is no corpus.
    """
    from finrepro.data.arriving.arriving import ArrivingWindows
    from finrepro.data.corpora.memory import TextStream
    from finrepro.data.corpora.mixture import Mixture
    from finrepro.data.corpora.windows import Windows
    from finrepro.data.tokens import encode

    windows: dict[str, Windows] = {}
    for part in spec.train_on.parts if spec.train.max_steps else ():
        task, name = task_of(part.task.task), part.task.task.name
        if not is_running_text(part.task):
            raise UsageError(
                f"{spec.train_on.name}: {name} is no running text, and mixes with none."
            )
        if corpus := corpora.get(name):
            stream, block = corpus.stream(), block_of(part.task)
            windows[name] = (
                ArrivingWindows(stream, spec.train.max_seq_len, block)
                if block
                else Windows(stream, spec.train.max_seq_len)
            )
            continue
        examples = datasets[part.task.dataset.name].splits["train"]
        texts = encode(
            tokenizer,
            [("", task.target(example)) for example in examples],
            sys.maxsize,
            end=False,
        )
        windows[name] = Windows(TextStream(text.ids for text in texts), spec.train.max_seq_len)
    if len(windows) <= 1:
        return next(iter(windows.values()), [])
    return Mixture(windows, {part.task.task.name: part.repeat for part in spec.train_on.parts})
