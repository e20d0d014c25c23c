"""What a cell starts from: its examples, its base with the tokenizer, and the evidence of what
they were.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finrepro.catalogue.spec import RunSpec
from finrepro.data import files
from finrepro.data.corpora.folders import corpus_of, is_running_text
from finrepro.data.files import Dataset
from finrepro.evidence.place import Place
from finrepro.kinds import task_of
from finrepro.running.text import windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from finrepro.data.arriving.growing import GrowingCorpus
    from finrepro.data.batches import Sample
    from finrepro.data.corpora.stream import Corpus
    from finrepro.data.tokens import Encoded


def load_data(spec: RunSpec, place: Place) -> dict[str, Dataset]:
    """Dataset name -> its splits, of everything the cell is trained or scored on; each is read
    once.
    """
    wanted: dict[str, set[str]] = {}
    choices = {}
    parts = spec.train_on.parts if spec.train.max_steps else ()
    needed = [(part.task, "train") for part in parts if corpus_of(part.task) is None] + [
        (each, spec.evaluation.split) for each in spec.tasks
    ]
    for each, split in needed:
        wanted.setdefault(each.dataset.name, set()).add(split)
        choices[each.dataset.name] = each.dataset
    return {
        name: files.load(choices[name], place.data_dir, tuple(sorted(splits)))
        for name, splits in wanted.items()
    }


def training_examples(
    spec: RunSpec,
    datasets: dict[str, Dataset],
    tokenizer: "PreTrainedTokenizerFast",
    opened: "dict[str, Corpus | GrowingCorpus]",
) -> "Sequence[Sample]":
    """Every training example, encoded, a part after the other; a repeated part stands there as
    often. Of running text, its windows, from what `corpora` has opened."""
    from finrepro.data.encoded import encode_once

    if any(is_running_text(part.task) for part in spec.train_on.parts):
        return windows_of(spec, datasets, tokenizer, opened)
    encoded: list[Encoded] = []
    for part in spec.train_on.parts if spec.train.max_steps else ():
        task = task_of(part.task.task)
        examples = datasets[part.task.dataset.name].splits["train"]
        pairs = [(task.prompt(example), task.target(example)) for example in examples]
        encoded += encode_once(tokenizer, pairs, spec.train.max_seq_len, end=True) * part.repeat
    return encoded


def data_facts(datasets: dict[str, Dataset]) -> dict[str, Any]:
    """Fingerprints of the splits, overlap between them, where their files were, and the files'
    sha256, by dataset.
    """
    return {
        key: {name: getattr(dataset, key) for name, dataset in datasets.items()}
        for key in ("fingerprints", "overlap", "origin", "files")
    }
