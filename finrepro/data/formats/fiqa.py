"""FiQA-SA: financial headlines and posts with a sentiment score for each target they name (WWW'18
open challenge, task 1).

The official test set has no scores, so everybody splits the training set again. Here the test set
is FLARE's 235 rows, read from FinLoRA's copy: PIXIU made them by shuffling the rows of each class
with a seed (The-FinAI/PIXIU@7923146, data/fiqasa/preprocess.py), but from files in an order that is
not public, so that the rule alone does not reproduce them. The training set is the rest of the
challenge's files, without any sentence of the test set. PIXIU divided rows, not sentences: 22 of
its test rows have their sentence also in its training or validation set.
"""

import math
from typing import Any

from finrepro import bounds
from finrepro.data.examples import Example, Splits
from finrepro.data.files import DatasetConfig, check_rows
from finrepro.data.formats.jsonl_labels import json_lines, split_prompt
from finrepro.data.text_fields import SENTIMENTS, decoded, label_of, text_of, where
from finrepro.errors import EnvironmentFault
from finrepro.settings import settings

SCORED = {"headline": "news", "post": "tweet"}  # file role -> what FinGPT's prompts call it


@settings
class Config(DatasetConfig):
    """Files `headline` and `post` of the challenge and `test`, in FinGPT's prompt form. Scores
    run from -1 to 1: below `low` is negative, from `low` and below `high` neutral, else
    positive."""

    low: float
    high: float


def needed(split: str, config: Config) -> tuple[str, ...]:
    """The files that a split is made of: the training set is what is not in the test set."""
    return ("test",) if split == "test" else (*SCORED, "test")


def read(contents: dict[str, bytes], name: str, config: Config) -> Splits:
    """Test rows in their file's order and, with the challenge's files, training rows: one for each
    target of a sentence.

    Raises `EnvironmentFault` on a file of another form or length.
    """
    rows = json_lines(contents["test"], name, "test")
    check_rows(name, "test", config.files["test"], len(rows))
    examples = []
    for row, line in enumerate(rows):
        place = where(name, "test", row + 1)
        context = text_of(line.get("context"), "context", place)
        instruction, text = split_prompt(context)
        source = SCORED["post"] if SCORED["post"] in instruction else SCORED["headline"]
        examples.append(
            Example(
                id=f"{name}/test/{row}",
                text=text_of(text, "Input of context", place),
                label=label_of(line.get("target"), "target", SENTIMENTS, place),
                source=source,
            )
        )
    test = tuple(examples)
    if not all(role in contents for role in SCORED):
        return {"test": test}
    held_out = {example.text for example in test}
    scored = [
        example for role in SCORED for example in scored_rows(contents[role], name, role, config)
    ]
    return {
        "train": tuple(example for example in scored if example.text not in held_out),
        "test": test,
    }


def scored_rows(content: bytes, name: str, role: str, config: Config) -> list[Example]:
    """Every sentence of one of the challenge's files as often as it has targets. Raises
    `EnvironmentFault` on another form or length.
    """
    try:
        sentences: dict[str, Any] = bounds.loads(decoded(content, name, role))
        check_rows(name, role, config.files[role], len(sentences), "sentences")
        return [
            Example(
                id=f"{name}/{role}/{key}/{number}",
                text=text_of(entry["sentence"], "sentence", where(name, role, f"entry {key}")),
                label=sentiment(float(target["sentiment_score"]), config),
                source=SCORED[role],
            )
            for key, entry in sentences.items()
            for number, target in enumerate(entry["info"])
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EnvironmentFault(
            f"dataset '{name}', file '{role}': not the challenge's form ({error!r})."
        ) from None


def sentiment(score: float, config: Config) -> str:
    """The class of a score, as FinGPT and PIXIU draw the borders. Raises `ValueError` for a score
    that is not finite.
    """
    if not math.isfinite(score):
        raise ValueError(f"a score is {score}")
    if score < config.low:
        return "negative"
    return "neutral" if score < config.high else "positive"
