"""Language modelling: predict the next token of plain text. Scored on held-out text by perplexity
per token, and by bits per byte, which compares models with different tokenizers.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from finrepro.data.examples import Example
from finrepro.settings import Positive, settings


@settings
class Config:
    """What is trained on and scored.

    - `endings`: one of them follows each text, drawn by the example's id, hence independent of its
      label. With them a miniature learns the wording of a task it will be fine-tuned on, and
      nothing about the answers.
    - `windows`: the texts are concatenated and cut into windows of `max_seq_len` tokens, which
      `global_batch_size` counts.
    - `corpus`: a corpus of configs/corpora.yaml to train on; the dataset is scored all the same.
    - `order`: that of the corpus' windows. `shuffled`: each epoch is a permutation of all windows.
      `arriving`: the corpus may be unfinished; in the first epoch each `block` of consecutive
      windows is permuted within itself.
    """

    version: int
    dataset: str
    endings: tuple[str, ...] = ("",)
    windows: bool = False
    corpus: str | None = None
    order: Literal["shuffled", "arriving"] | None = None
    block: Positive | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for a corpus without windows or an order, and for one of these
        settings without the other that it needs.
        """
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
    """Empty: every token of the text is predicted, the first from the beginning-of-text token."""
    return ""


def target(example: Example, config: Config) -> str:
    """The text and its ending."""
    number = int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:4])
    return example.text + config.endings[number % len(config.endings)]


def choices(example: Example, config: Config) -> None:
    """None: there is no choice, the text itself is scored."""
    return


def parse(output: str, example: Example, config: Config) -> str:
    """The output itself: any text is text."""
    return output


def cluster(example: Example) -> str:
    """The unit that the bootstrap resamples: the paragraphs of an article, or equal texts."""
    return example.source or example.text


def constant_answers(config: Config) -> tuple[str, ...]:
    """No constant baseline: no constant text is an answer."""
    return ()


def constant(answer: str, example: Example, config: Config) -> str:
    """Unused, as there is no constant baseline."""
    return answer


def tally(rows: Sequence[dict[str, Any]], config: Config) -> Float[np.ndarray, "rows 3"]:
    """Each row's summed log-probability (nats), number of predicted tokens, and UTF-8 bytes."""
    return np.array(
        [[row["logprob"], row["tokens"], row["bytes"]] for row in rows], dtype=float
    ).reshape(-1, 3)


def score(
    sums: Float[np.ndarray, "*batch 3"], config: Config
) -> dict[str, Float[np.ndarray, "*batch"]]:
    """Perplexity per token and bits per byte from summed tallies; above 709 nats a token the
    perplexity is infinite.
    """
    logprob, tokens, size = sums[..., 0], sums[..., 1], sums[..., 2]
    with np.errstate(over="ignore"):
        perplexity = np.asarray(np.exp(-logprob / tokens))
    return {
        "perplexity": perplexity,
        "bits_per_byte": np.asarray(-logprob / (np.log(2) * size)),
    }
