"""An example, the splits of a dataset, and their fingerprints, duplicates and overlaps."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from finrepro import strict_json
from finrepro.settings import settings


@settings
class Example:
    """One item of a dataset. `id` is stable: dataset, file role and row, as `tfns/test/17`.

    `source` is where the text is from, if the dataset states it: "tweet" or "news", or a document.
    """

    id: str
    text: str
    label: str
    source: str = ""


Splits = dict[str, tuple[Example, ...]]  # "train", "development", "test"


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over the examples in their order, with ids, texts, labels and sources: the identity of
    the data that a run read.
    """
    return _fingerprint(tuple(examples))


@lru_cache(maxsize=8)
def _fingerprint(examples: tuple[Example, ...]) -> str:
    """Computed once a process for equal examples: a table's cells share their data sets."""
    digest = hashlib.sha256()
    for example in examples:
        fields = [
            example.id,
            example.text,
            example.label,
            *([example.source] if example.source else []),
        ]
        line = strict_json.dumps(fields, ensure_ascii=False)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def normalized(text: str) -> str:
    """The text's letters in lower case: texts that differ only in digits, case or punctuation are
    near-duplicates.
    """
    return "".join(character for character in text.lower() if character.isalpha())


def overlap(splits: Splits) -> dict[str, int]:
    """Numbers of duplicates inside each split, and of examples of one split with an exact or a near
    duplicate in another.

    They are reported beside the scores and never removed: a published split is scored as published.
    """
    return dict(_overlap(tuple(splits.items())))


@lru_cache(maxsize=8)
def _overlap(named: tuple[tuple[str, tuple[Example, ...]], ...]) -> dict[str, int]:
    splits = dict(named)
    report = {}
    for name, examples in splits.items():
        counts = Counter(example.text for example in examples)
        report[f"{name}/duplicates"] = sum(count - 1 for count in counts.values())
    exact = {name: {example.text for example in examples} for name, examples in splits.items()}
    near = {name: {normalized(text) for text in texts} for name, texts in exact.items()}
    for scored in ("development", "test"):
        for trained in splits if scored in splits else ():
            if trained == scored or trained not in ("train", "development"):
                continue
            texts = [example.text for example in splits[scored]]
            report[f"{scored}/also_in_{trained}"] = sum(text in exact[trained] for text in texts)
            report[f"{scored}/nearly_in_{trained}"] = sum(
                normalized(text) in near[trained] for text in texts
            )
    return report
