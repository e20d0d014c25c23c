"""Financial PhraseBank's `sentence@label` lines (Malo et al., 2014), split as FinGPT split it.

The release has no split. FinGPT and FinLoRA score on `datasets.train_test_split(seed=42)`, a random
quarter; `RandomSplit` gives the same 1,212 rows in the same order by NumPy's generator alone.
"""

import numpy as np

from finrepro.data.examples import Example, Splits
from finrepro.data.files import DatasetConfig, check_rows
from finrepro.data.text_fields import SENTIMENTS, decoded, label_of, text_of, where
from finrepro.settings import settings


@settings
class RandomSplit:
    """The first `test_rows` of `numpy.random.default_rng(seed).permutation(rows)` are the test
    set, the rest is train.
    """

    seed: int
    test_rows: int


@settings
class Config(DatasetConfig):
    """One file, under the role `all`, with a fixed encoding."""

    encoding: str
    split: RandomSplit


def needed(split: str, config: Config) -> tuple[str, ...]:
    """The files that a split is made of: both are cut from the one file."""
    return ("all",)


def read(contents: dict[str, bytes], name: str, config: Config) -> Splits:
    """Train and test in the order of the permutation. Raises `EnvironmentFault` on a wrong
    number of lines, and a line without text or of another label.
    """
    # Not splitlines(): in ISO-8859-1 it would also break at control characters inside a sentence.
    lines = (
        decoded(contents["all"], name, "all", config.encoding)
        .replace("\r\n", "\n")
        .removesuffix("\n")
        .split("\n")
    )
    check_rows(name, "all", config.files["all"], len(lines), "lines")
    examples = []
    for row, line in enumerate(lines):
        text, _, label = line.rpartition("@")
        place = where(name, "all", row + 1)
        text = text_of(text, "text before @", place)
        label = label_of(label, "label after @", SENTIMENTS, place)
        examples.append(Example(id=f"{name}/all/{row}", text=text, label=label))
    order = np.random.default_rng(config.split.seed).permutation(len(examples))
    shuffled = [examples[row] for row in order]
    return {
        "train": tuple(shuffled[config.split.test_rows :]),
        "test": tuple(shuffled[: config.split.test_rows]),
    }
