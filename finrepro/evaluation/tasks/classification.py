"""Classification into a closed set of labels, as sentiment. The answer is the label with the
highest log-likelihood after the prompt.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from finrepro.data.examples import Example
from finrepro.evaluation.metrics import classification_scores, pair_index
from finrepro.settings import settings


@settings
class Config:
    """`dataset` names an entry of datasets.yaml; `templates` maps a template's name to a string
    with `{text}`, and `{source}` where the wording depends on the text's source. `label_map` maps
    the dataset's labels to `labels`; empty: they are the same.
    """

    version: int
    dataset: str
    labels: tuple[str, ...]
    templates: dict[str, str]
    label_map: dict[str, str] = dataclasses.field(default_factory=dict)
    template: str = ""  # chosen by the table; resolved before a cell is hashed

    def __post_init__(self) -> None:
        """Raises `ValueError` for a map to an unknown label of the task."""
        unknown = sorted(set(self.label_map.values()) - set(self.labels))
        if unknown:
            raise ValueError(
                f"label_map leads to {', '.join(unknown)}; labels are {', '.join(self.labels)}"
            )


def prompt(example: Example, config: Config) -> str:
    """The template with text and source filled in; other braces belong to the wording."""
    return (
        config.templates[config.template]
        .replace("{source}", example.source)
        .replace("{text}", example.text)
    )


def answer_to(label: str, config: Config) -> str:
    """The task's label for a label of the dataset. Raises `KeyError` for one that is not in
    `label_map`.
    """
    return config.label_map[label] if config.label_map else label


def target(example: Example, config: Config) -> str:
    """The supervised answer: a space and the label, so that prompt and answer join naturally."""
    return " " + answer_to(example.label, config)


def choices(example: Example, config: Config) -> tuple[str, ...]:
    """The answers to score, in the order of `config.labels`."""
    return tuple(" " + label for label in config.labels)


def parse(output: str, example: Example, config: Config) -> str | None:
    """The label that generated text names; None, which is scored as a wrong answer, where it names
    none or several.

    Only the first line counts, and it must consist of one label (case and punctuation aside). An
    empty output, further words, or a repeated instruction that lists all labels is no answer.
    """
    lines = output.strip().splitlines()
    words = re.findall(r"[\w-]+", lines[0].lower()) if lines else []
    labels = [label for label in config.labels if words == re.findall(r"[\w-]+", label.lower())]
    return labels[0] if len(labels) == 1 else None


def cluster(example: Example) -> str:
    """The unit that the bootstrap resamples: equal texts are one observation."""
    return example.text


def constant_answers(config: Config) -> tuple[str, ...]:
    """The constant baselines: each label, for every example."""
    return config.labels


def constant(answer: str, example: Example, config: Config) -> str:
    """The prediction of a constant baseline: the label itself."""
    return answer


def tally(rows: Sequence[dict[str, Any]], config: Config) -> Float[np.ndarray, "rows cells"]:
    """Each row's (gold, prediction) pair as a flattened one-hot confusion matrix; `score` needs
    only their sums.

    `gold` is the dataset's label, which `label_map` turns into the task's.
    """
    gold = [answer_to(row["gold"], config) for row in rows]
    pairs = pair_index(gold, [row["prediction"] for row in rows], config.labels)
    return np.eye(len(config.labels) * (len(config.labels) + 1))[pairs]


def score(
    sums: Float[np.ndarray, "*batch cells"], config: Config
) -> dict[str, Float[np.ndarray, "*batch"]]:
    """Every metric from summed tallies."""
    size = len(config.labels)
    return classification_scores(sums.reshape(*sums.shape[:-1], size, size + 1))
