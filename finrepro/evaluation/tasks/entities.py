"""Named entity recognition as text: one entity a line, in order, as `Evergreen Solar Inc, ORG`, or
`none`. Scored by entity F1.

A name does not say which of its occurrences is the entity. FLARE's scorer labels every occurrence,
so that even the gold answers score 0.98. Here a line means one occurrence, on whole tokens: the
first that begins after the entity of the line before. An entity at another occurrence has its
number, counted from the beginning of the sentence: `Lender, PER #3`. So the gold answers score 1.
No sentence of FIN needs the number, so the prompts do not mention it.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float

from finrepro.data.examples import Example
from finrepro.settings import Positive, settings

NONE = "none"
# What follows a line's last comma.
KIND = re.compile(r"(?P<kind>[A-Za-z]+)(?:\s*#(?P<number>[1-9]\d{0,3}))?")
UNREADABLE = "?"  # in a prediction: a line that names no entity
Span = tuple[int, int, str]  # first token, last token, type


@settings
class Config:
    """`types` are the entity types; `max_new_tokens` limits an answer, and is at least the length
    of the longest gold answer. `known` maps words to their type, for a constant baseline.
    """

    version: int
    dataset: str
    types: tuple[str, ...]
    known: dict[str, str]
    max_new_tokens: Positive
    templates: dict[str, str]
    template: str = ""  # chosen by the table; resolved before a cell is hashed


def prompt(example: Example, config: Config) -> str:
    """The template with the text filled in; other braces belong to the wording."""
    return config.templates[config.template].replace("{text}", example.text)


def target(example: Example, config: Config) -> str:
    """The supervised answer: a space, so that prompt and answer join naturally, and the lines."""
    tokens, lines, end = example.text.split(" "), [], -1
    for first, last, kind in spans(example.label):
        name = " ".join(tokens[first : last + 1])
        matches = occurrences(name, tokens)
        number = matches.index((first, last)) + 1
        nearest = next(match for match in matches if match[0] > end)
        lines.append(f"{name}, {kind}" + ("" if nearest == (first, last) else f" #{number}"))
        end = last
    return " " + ("\n".join(lines) or NONE)


def choices(example: Example, config: Config) -> None:
    """None: the answer is generated."""
    return


def new_tokens(config: Config) -> int:
    """The largest number of tokens of an answer."""
    return config.max_new_tokens


def parse(output: str, example: Example, config: Config) -> str | None:
    """The predicted entities in the form of `span_text`; None, which is scored as a wrong answer,
    where no line can be read.

    The answer ends at the first empty line. `none` alone means no entity. Every other line is a
    predicted entity. It is a false positive where it cannot be read, names no (such) occurrence, or
    repeats a span, so that superfluous lines cost precision. White space is ignored, case and
    punctuation are not.
    """
    lines = output.strip().split("\n\n")[0].splitlines()
    if len(lines) == 1 and re.sub(r"\W", "", lines[0]).lower() == NONE:
        return ""
    mentions = [_mention(line, config) for line in lines]
    if not any(mentions):
        return None
    tokens, end = example.text.split(" "), -1
    items: list[str] = []
    for mention in mentions:
        if mention is None:
            items.append(UNREADABLE)
            continue
        name, kind, number = mention
        matches = occurrences(name, tokens)
        if number:
            selected = matches[number - 1 : number]
        else:
            selected = [match for match in matches if match[0] > end][:1]
        item = span_text([(*selected[0], kind)]) if selected else ""
        items.append(item if item and item not in items else f"{UNREADABLE}/{kind}")
        end = selected[0][1] if selected else end
    return " ".join(items)


def cluster(example: Example) -> str:
    """The unit that the bootstrap resamples: equal sentences are one observation."""
    return example.text


def constant_answers(config: Config) -> tuple[str, ...]:
    """The constant baselines: no entity, or the known words wherever they occur."""
    return NONE, *([", ".join(config.known)] if config.known else [])


def constant(answer: str, example: Example, config: Config) -> str:
    """The prediction of a constant baseline for an example."""
    if answer == NONE:
        return ""
    kinds = [config.known.get(token) for token in example.text.split(" ")]
    return span_text([(position, position, kind) for position, kind in enumerate(kinds) if kind])


def tally(rows: Sequence[dict[str, Any]], config: Config) -> Float[np.ndarray, "rows cells"]:
    """Each row's counts: for each type true positives, predicted and gold entities; unreadable
    lines; 1 if unparsable; 1.

    An unparsable answer counts as one unreadable line: also where there is no entity, the answer is
    `none`, not silence.
    """
    table = np.zeros((len(rows), 3 * len(config.types) + 3))
    for row, counts in zip(rows, table, strict=True):
        gold = set(span_text(spans(row["gold"])).split())
        prediction = UNREADABLE if row["prediction"] is None else row["prediction"]
        for item in prediction.split():
            if item == UNREADABLE:
                counts[-3] += 1
            else:
                counts[3 * _index(item, config) + 1] += 1
                counts[3 * _index(item, config)] += item in gold
        for item in gold:
            counts[3 * _index(item, config) + 2] += 1
        counts[-2:] = row["prediction"] is None, 1
    return table


def score(
    sums: Float[np.ndarray, "*batch cells"], config: Config
) -> dict[str, Float[np.ndarray, "*batch"]]:
    """Every metric from summed tallies: micro F1, precision and recall of exact entities as in
    seqeval, each type's F1, and the rate of unparsable answers.
    """
    by_type = sums[..., :-3].reshape(*sums.shape[:-1], len(config.types), 3)
    correct, predicted, gold = (by_type[..., column] for column in range(3))
    hits, all_predicted, all_gold = correct.sum(-1), predicted.sum(-1) + sums[..., -3], gold.sum(-1)
    metrics = {
        "f1_entity": _ratio(2 * hits, all_predicted + all_gold),
        "precision_entity": _ratio(hits, all_predicted),
        "recall_entity": _ratio(hits, all_gold),
    }
    for position, kind in enumerate(config.types):
        metrics[f"f1_{kind.lower()}"] = _ratio(
            2 * correct[..., position], (predicted + gold)[..., position]
        )
    return metrics | {"unparsable_rate": _ratio(sums[..., -2], sums[..., -1])}


def spans(tags: str) -> list[Span]:
    """The entities of tags joined by spaces, in order, by seqeval's definition (chunks as in
    conlleval).
    """
    return list(_spans(tags))


@cache
def _spans(tags: str) -> tuple[Span, ...]:
    from seqeval.metrics.sequence_labeling import get_entities

    return tuple(
        (int(first), int(last), str(kind)) for kind, first, last in get_entities(tags.split(" "))
    )


def span_text(entities: Sequence[Span]) -> str:
    """Entities as text, `first-last/TYPE` joined by spaces: the form of a prediction in a row."""
    return " ".join(f"{first}-{last}/{kind}" for first, last, kind in entities)


def occurrences(name: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """(first, last) token of every run of tokens that spells the name, white space aside, in
    order.
    """
    letters = "".join(name.split())
    runs = []
    for first in range(len(tokens)):
        spelled = ""
        for last in range(first, len(tokens)):
            spelled += tokens[last]
            if spelled == letters:
                runs.append((first, last))
            if not letters.startswith(spelled) or spelled == letters:
                break
    return runs


def _mention(line: str, config: Config) -> tuple[str, str, int] | None:
    """(name, type, number of the occurrence or 0) of a well-formed line, else None."""
    name, _, rest = line.strip().rpartition(",")
    match = KIND.fullmatch(rest.strip())
    if not name.strip() or match is None or match["kind"].upper() not in config.types:
        return None
    return name, match["kind"].upper(), int(match["number"] or 0)


def _index(item: str, config: Config) -> int:
    return config.types.index(item.rpartition("/")[2])


def _ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """numerator / denominator, 0 where the denominator is 0, as in seqeval."""
    return np.divide(
        numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator > 0
    )
