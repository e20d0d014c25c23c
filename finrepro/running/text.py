"""Running text that a cell is trained on."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finrepro.catalogue.spec import RunSpec
from finrepro.data.corpora.folders import TOKENIZER, block_of, corpus_of, folder_of, is_running_text
from finrepro.data.files import Dataset
from finrepro.data.tokens import tokenizer_digest
from finrepro.errors import EnvironmentFault, UsageError, unavailable_if_faulty
from finrepro.evidence.place import Place
from finrepro.kinds import task_of
from finrepro.planning.availability import corpus_missing_reason, is_fed

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
    from finrepro.data.corpora.stream import open_corpus
    from finrepro.data.preparing.entries import unlike

    found: dict[str, Corpus | GrowingCorpus] = {}
    for part in spec.train_on.parts if spec.train.max_steps else ():
        if name := corpus_of(part.task):
            folder, rows = folder_of(name, place.data_dir), spec.model.architecture["vocab_size"]
            with unavailable_if_faulty():
                reason = corpus_missing_reason(spec, part.task, place)
                if folder is None or reason:
                    raise EnvironmentFault(str(reason))
                if is_fed(spec, part.task):
                    corpus = open_arriving(folder, rows, waiting)
                else:
                    corpus = open_corpus(
                        folder, tokenizer_digest(folder / TOKENIZER) or "none", rows
                    )
                if said := unlike(name, corpus.index):
                    raise EnvironmentFault(f"{folder}: {said}")
                corpus.stream()  # every shard is there, and as long as it was
                found[part.task.task.name] = corpus
    return found


def corpora_facts(spec: RunSpec, found: "dict[str, Corpus | GrowingCorpus]") -> dict[str, Any]:
    """What of the corpora goes into a result: the sha256 of the index, or of the shards of an
    unfinished one that all steps together take their windows from, in whichever attempt; source
    and size."""
    from finrepro.data.arriving.growing import GrowingCorpus

    facts = {
        name: each.facts() for name, each in found.items() if not isinstance(each, GrowingCorpus)
    }
    for part in spec.train_on.parts:
        each, block = found.get(part.task.task.name), block_of(part.task)
        if isinstance(each, GrowingCorpus) and block:
            blocks = -(-spec.train.max_steps * spec.train.global_batch_size // block)
            facts[part.task.task.name] = each.facts(blocks * block * spec.train.max_seq_len + 1)
    return facts


def corpora_identity(spec: RunSpec, found: "dict[str, Corpus | GrowingCorpus]") -> dict[str, Any]:
    """What a checkpoint is held to. Of a corpus that may be unfinished it is what it is made
    from: the same before its end and after.
    """
    fed = {part.task.task.name: is_fed(spec, part.task) for part in spec.train_on.parts}
    return {name: each.made_from() if fed[name] else each.facts() for name, each in found.items()}


def while_waiting(
    report: "Callable[[dict[str, Any]], None]",
    stop_requested: "Callable[[], bool]",
    tend: "Callable[[], bool]",
) -> "Waiting":
    """What is done while text is waited for: say so once, see that somebody prepares it, and
    stop where that is asked.
    """
    from finrepro.errors import Interrupted

    said: list[str] = []

    def waiting(what: str) -> bool:
        if stop_requested():
            raise Interrupted(
                "stopped while it waited for text; it goes on from its last checkpoint, if there is one"
            )
        if said[-1:] != [what]:
            said.append(what)
            report({"event": "phase", "phase": what})
        return tend()

    return waiting


def windows_of(
    spec: RunSpec,
    datasets: dict[str, Dataset],
    tokenizer: "PreTrainedTokenizerFast",
    opened: "dict[str, Corpus | GrowingCorpus]",
) -> "Sequence[Sample]":
    """Windows of the corpora, mixed as often as their parts are repeated. Raises `UsageError`
    where a part is no corpus.
    """
    from finrepro.data.arriving.arriving import ArrivingWindows
    from finrepro.data.corpora.memory import TextStream
    from finrepro.data.corpora.mixture import Mixture
    from finrepro.data.corpora.windows import Windows
    from finrepro.data.tokens import encode

    made: dict[str, Windows] = {}
    for part in spec.train_on.parts if spec.train.max_steps else ():
        task = task_of(part.task.task)
        if not is_running_text(part.task):
            raise UsageError(
                f"{spec.train_on.name}: {part.task.task.name} is no running text, and mixes with none."
            )
        if corpus := opened.get(part.task.task.name):
            stream, block = corpus.stream(), block_of(part.task)
            made[part.task.task.name] = (
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
        made[part.task.task.name] = Windows(
            TextStream(text.ids for text in texts), spec.train.max_seq_len
        )
    if len(made) <= 1:
        return next(iter(made.values()), [])
    return Mixture(made, {part.task.task.name: part.repeat for part in spec.train_on.parts})
