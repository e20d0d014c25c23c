"""Predict the next token of plain text. Scored on text that was not trained on: perplexity per
token, and bits per byte, which models with different tokenizers have in common."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from finrepro.data.examples import Example
from finrepro.settings import Positive, settings


@settings
class Config:
    """`endings`: one of them follows each text, chosen by the example's id and so without regard to
    its label.

    They let a miniature read and write the wording of a task it will be fine-tuned on, while it
    learns nothing about the answers. `windows`: the texts are a corpus. Laid end to end they are
    cut in windows of `max_seq_len` tokens, which `global_batch_size` counts. `corpus` names what is
    trained on instead of the dataset: a corpus of configs/corpora.yaml; scored is the dataset.
    `order` is that of a corpus' windows: `shuffled`, each epoch a permutation of all of them, or
    `arriving`, for which the corpus need not be finished: in the first epoch `block` windows that
    follow one another are permuted among themselves.
    """

    version: int
    dataset: str
    endings: tuple[str, ...] = ("",)
    windows: bool = False
    corpus: str | None = None
    order: Literal["shuffled", "arriving"] | None = None
    block: Positive | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for a corpus that is not read in windows, or not in a given order."""
        if self.corpus and not self.windows:
            raise ValueError("a corpus is read in windows: say windows: true")
        if (self.order is None) == bool(self.corpus):
            raise ValueError("a corpus, and nothing else, needs an order: shuffled or arriving")
        if (self.block is None) == (self.order == "arriving"):
            raise ValueError(
                "order: arriving, and nothing else, needs a block: "
                "how many windows are permuted among themselves"
            )


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
    """What the bootstrap resamples: the paragraphs of an article, or equal texts, are one
    observation.
    """
    return example.source or example.text


def constant_answers(config: Config) -> tuple[str, ...]:
    """None: no constant text is an answer."""
    return ()


def constant(answer: str, example: Example, config: Config) -> str:
    """What a constant answer predicts for an example: itself."""
    return answer


def tally(rows: Sequence[dict[str, Any]], config: Config) -> Float[np.ndarray, "rows 3"]:
    """Each row's summed natural log-probability, its number of predicted tokens, and its bytes
    of UTF-8.
    """
    return np.array(
        [[row["logprob"], row["tokens"], row["bytes"]] for row in rows], dtype=float
    ).reshape(-1, 3)


def score(
    sums: Float[np.ndarray, "*batch 3"], config: Config
) -> dict[str, Float[np.ndarray, "*batch"]]:
    """Perplexity per token and bits per byte from summed tallies."""
    logprob, tokens, size = sums[..., 0], sums[..., 1], sums[..., 2]
    return {
        "perplexity": np.asarray(np.exp(-logprob / tokens)),
        "bits_per_byte": np.asarray(-logprob / (np.log(2) * size)),
    }
