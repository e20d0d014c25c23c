"""Predict the next token of plain text. Scored by perplexity per token on text that was not trained on."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from finrepro.examples import Example
from finrepro.schema import settings


@settings
class Config:
    """`endings`: one of them follows each text, chosen by the example's id and so without regard to its label.

    They let a miniature read and write the wording of a task it will be fine-tuned on, while it learns nothing about the answers.
    """

    version: int
    dataset: str
    endings: tuple[str, ...] = ("",)


def prompt(example: Example, config: Config) -> str:
    """Nothing: every token of the text is predicted, the first from the beginning-of-text token."""
    return ""


def target(example: Example, config: Config) -> str:
    """The whole text and its ending."""
    number = int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:4])
    return example.text + config.endings[number % len(config.endings)]


def choices(example: Example, config: Config) -> None:
    """None: the text itself is scored, nothing is chosen."""
    return


def parse(output: str, example: Example, config: Config) -> str:
    """The output itself: any text is text."""
    return output


def cluster(example: Example) -> str:
    """What the bootstrap resamples: equal texts are one observation."""
    return example.text


def constant_answers(config: Config) -> tuple[str, ...]:
    """None: no constant text is an answer."""
    return ()


def constant(answer: str, example: Example, config: Config) -> str:
    """What a constant answer predicts for an example: itself."""
    return answer


def tally(rows: Sequence[dict[str, Any]], config: Config) -> Float[np.ndarray, "rows 2"]:
    """Each row's summed natural log-probability and its number of predicted tokens."""
    return np.array([[row["logprob"], row["tokens"]] for row in rows], dtype=float).reshape(-1, 2)


def score(sums: Float[np.ndarray, "*batch 2"], config: Config) -> dict[str, Float[np.ndarray, "*batch"]]:
    """Perplexity per token from summed tallies."""
    return {"perplexity": np.asarray(np.exp(-sums[..., 0] / sums[..., 1]))}
