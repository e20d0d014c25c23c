"""Choose one of a closed set of labels: sentiment and the like. Scored by the log-likelihood of
each label after the prompt.
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
    with `{text}`, and `{source}` where the wording depends on what the text is. `label_map` says
    which of `labels` each of the dataset's means; empty: they are the same."""

    version: int
    dataset: str
    labels: tuple[str, ...]
    templates: dict[str, str]
    label_map: dict[str, str] = dataclasses.field(default_factory=dict)
    template: str = ""  # chosen by the table; resolved before a cell is hashed

    def __post_init__(self) -> None:
        """Raises `ValueError` for a map to something that is no label of the task."""
        wrong = sorted(set(self.label_map.values()) - set(self.labels))
        if wrong:
            raise ValueError(
                f"label_map leads to {', '.join(wrong)}; labels are {', '.join(self.labels)}"
            )


def prompt(example: Example, config: Config) -> str:
    """The template with the text put in. Plain replacement: other braces belong to the wording."""
    return (
        config.templates[config.template]
        .replace("{source}", example.source)
        .replace("{text}", example.text)
    )


def answer_to(label: str, config: Config) -> str:
    """The task's label for one of the dataset's. Raises `KeyError` for one that `label_map` does
    not know.
    """
    return config.label_map[label] if config.label_map else label


def target(example: Example, config: Config) -> str:
    """The answer to learn: a space and the label, so that prompt and answer are one natural
    string.
    """
    return " " + answer_to(example.label, config)


def choices(example: Example, config: Config) -> tuple[str, ...]:
    """Every answer that is scored, in the order of `config.labels`."""
    return tuple(" " + label for label in config.labels)


def parse(output: str, example: Example, config: Config) -> str | None:
    """The label that generated text names, or None when it names none or several: counted, never
    dropped.

    Only the first line counts, and it must consist of one label (case and closing punctuation
    aside). Neither silence, nor rambling, nor a repeated instruction that lists all the labels is
    an answer.
    """
    lines = output.strip().splitlines()
    words = re.findall(r"[\w-]+", lines[0].lower()) if lines else []
    named = [label for label in config.labels if words == re.findall(r"[\w-]+", label.lower())]
    return named[0] if len(named) == 1 else None


def cluster(example: Example) -> str:
    """What the bootstrap resamples: equal texts are one observation."""
    return example.text


def constant_answers(config: Config) -> tuple[str, ...]:
    """The answers that need no model: one label, always."""
    return config.labels


def constant(answer: str, example: Example, config: Config) -> str:
    """What a constant answer predicts for an example: itself."""
    return answer


def tally(rows: Sequence[dict[str, Any]], config: Config) -> Float[np.ndarray, "rows cells"]:
    """Each row's (gold, prediction) pair as a flattened one-hot confusion array; sums over rows are
    all that `score` needs.

    `gold` is the dataset's label, which the map turns into the task's.
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
