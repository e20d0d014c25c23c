"""What a cell starts from: its examples, its base with the tokenizer, and the evidence of what
they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro import strict_json
from finrepro.catalogue.spec import RunSpec
from finrepro.data import files
from finrepro.data.arriving.growing import Waiting
from finrepro.data.corpora.folders import corpus_of, is_running_text
from finrepro.data.files import Dataset
from finrepro.errors import failed_if_faulty, unavailable_if_faulty
from finrepro.evidence import provenance
from finrepro.evidence.place import Place
from finrepro.kinds import task_of
from finrepro.models.end_tokens import end_tokens
from finrepro.running.base import base_facts, open_base
from finrepro.running.text import corpora_identity, open_corpora, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from finrepro.data.arriving.growing import GrowingCorpus
    from finrepro.data.batches import Sample
    from finrepro.data.corpora.stream import Corpus
    from finrepro.data.tokens import Encoded


@dataclass(frozen=True)
class Inputs:
    """Everything that a cell is made from. `datasets` and `corpora` are by the names of datasets
    and of tasks; `base` is the folder of its weights, None: random ones;
    `ends` are the tokens that end an answer.
    """

    datasets: dict[str, Dataset]
    corpora: "dict[str, Corpus | GrowingCorpus]"
    base: Path | None
    tokenizer: "PreTrainedTokenizerFast"
    tokenizer_origin: str
    ends: tuple[int, ...]
    examples: "Sequence[Sample]"
    base_facts: dict[str, Any]
    text_identity: dict[str, Any]

    def made_by(self) -> str:
        """What a checkpoint is held to: source, packages, base and text."""
        digests = [provenance.source_digest(), provenance.lock_digest()]
        return strict_json.dumps([*digests, self.base_facts, self.text_identity])


def prepare(spec: RunSpec, place: Place, waiting: Waiting) -> Inputs:
    """Read and check everything that the cell starts from; `waiting` is called while text is
    waited for.

    Raises `Unavailable` when the base or a corpus is not there or is faulty, `DataFault`
    when a dataset is.
    """
    datasets = load_data(spec, place)
    corpora = open_corpora(spec, place, waiting)
    base, tokenizer, origin = open_base(spec, place)
    with unavailable_if_faulty():
        ends = end_tokens(base, tokenizer)
    return Inputs(
        datasets=datasets,
        corpora=corpora,
        base=base,
        tokenizer=tokenizer,
        tokenizer_origin=origin,
        ends=ends,
        base_facts=base_facts(spec, place.store, base),
        text_identity=corpora_identity(spec, corpora),
        examples=training_examples(spec, datasets, tokenizer, corpora),
    )


def load_data(spec: RunSpec, place: Place) -> dict[str, Dataset]:
    """Dataset name -> its splits, of everything the cell is trained or scored on; each is read
    once. Raises `DataFault` for one that cannot be.
    """
    splits: dict[str, set[str]] = {}
    entries = {}
    parts = spec.train_on.parts if spec.train.max_steps else ()
    trained = [(part.task, "train") for part in parts if corpus_of(part.task) is None]
    scored = [(task, spec.evaluation.split) for task in spec.tasks]
    for task, split in trained + scored:
        splits.setdefault(task.dataset.name, set()).add(split)
        entries[task.dataset.name] = task.dataset
    with failed_if_faulty():
        return {
            name: files.load(entry, place.data_dir, tuple(sorted(splits[name])))
            for name, entry in entries.items()
        }


def training_examples(
    spec: RunSpec,
    datasets: dict[str, Dataset],
    tokenizer: "PreTrainedTokenizerFast",
    corpora: "dict[str, Corpus | GrowingCorpus]",
) -> "Sequence[Sample]":
    """Every training example, encoded, a part after the other; a repeated part stands there as
    often. Of running text, the windows of `corpora`, which `open_corpora` has opened."""
    from finrepro.data.encoded import encode_once

    if any(is_running_text(part.task) for part in spec.train_on.parts):
        return windows_of(spec, datasets, tokenizer, corpora)
    encoded: list[Encoded] = []
    for part in spec.train_on.parts if spec.train.max_steps else ():
        task = task_of(part.task.task)
        examples = datasets[part.task.dataset.name].splits["train"]
        pairs = [(task.prompt(example), task.target(example)) for example in examples]
        encoded += encode_once(tokenizer, pairs, spec.train.max_seq_len, end=True) * part.repeat
    return encoded
