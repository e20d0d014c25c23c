"""An example, a split of examples, and what can be said about them without a model: fingerprint,
duplicates, overlap.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from finrepro.settings import settings


@settings
class Example:
    """One item of a dataset. `id` is stable: dataset, file role and row, as `tfns/test/17`.

    `source` says what the text is taken from, where the dataset tells: "tweet" or "news", or which
    document.
    """

    id: str
    text: str
    label: str
    source: str = ""


Splits = dict[str, tuple[Example, ...]]  # "train", "development", "test"


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over the examples in their order, ids, texts, labels and sources: the data that a
    run really saw.
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
        line = json.dumps(fields, ensure_ascii=False)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def normalized(text: str) -> str:
    """Letters only, lower case: two texts that differ in digits, case or punctuation are
    near-duplicates.
    """
    return "".join(character for character in text.lower() if character.isalpha())


def overlap(splits: Splits) -> dict[str, int]:
    """Duplicates inside each split and examples of one split that stand in another, exactly and
    nearly.

    Reported beside the scores, never silently removed: a published split is scored as it was
    published.
    """
    return dict(_overlap(tuple(splits.items())))


@lru_cache(maxsize=8)
def _overlap(named: tuple[tuple[str, tuple[Example, ...]], ...]) -> dict[str, int]:
    splits = dict(named)
    report = {}
    for name, examples in splits.items():
        counts = Counter(example.text for example in examples)
        report[f"{name}/duplicates"] = sum(count - 1 for count in counts.values())
    seen = {name: {example.text for example in examples} for name, examples in splits.items()}
    near = {name: {normalized(text) for text in texts} for name, texts in seen.items()}
    for name in ("development", "test"):
        others = [other for other in splits if other != name and other in ("train", "development")]
        for other in others if name in splits else ():
            report[f"{name}/also_in_{other}"] = sum(e.text in seen[other] for e in splits[name])
            report[f"{name}/nearly_in_{other}"] = sum(
                normalized(e.text) in near[other] for e in splits[name]
            )
    return report
