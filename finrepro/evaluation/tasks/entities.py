"""Name the entities of a sentence, one a line in their order: `Evergreen Solar Inc, ORG`; `none`
where there are none. Scored by entity F1.

A name alone does not say where in the sentence it stands, and FLARE's scorer labels every
occurrence, so that the right answers score 0.98. Here a line means one place: the first occurrence
of the name, on whole tokens, that begins after the entity of the line before it. Where an entity is
not that one, its line says which occurrence it is, counted from the beginning of the sentence:
`Lender, PER #3`. With that the right answers score 1. No sentence of FIN needs the number, so the
prompts do not speak of it.
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
KIND = re.compile(
    r"(?P<kind>[A-Za-z]+)(?:\s*#(?P<number>[1-9]\d{0,3}))?"
)  # what follows a line's last comma
UNREADABLE = "?"  # in a prediction: a line that names nothing
Span = tuple[int, int, str]  # first token, last token, type


@settings
class Config:
    """`types` are the entity types; `max_new_tokens` is the most that an answer may have, at least
    the longest right answer's.

    `known` holds words that are always the same entity: what a constant answer knows.
    """

    version: int
    dataset: str
    types: tuple[str, ...]
    known: dict[str, str]
    max_new_tokens: Positive
    templates: dict[str, str]
    template: str = ""  # chosen by the table; resolved before a cell is hashed


def prompt(example: Example, config: Config) -> str:
    """The template with the text put in. Plain replacement: other braces belong to the wording."""
    return config.templates[config.template].replace("{text}", example.text)


def target(example: Example, config: Config) -> str:
    """The answer to learn: a space, so that prompt and answer are one natural string, and the
    lines.
    """
    tokens, lines, after = example.text.split(" "), [], -1
    for first, last, kind in spans(example.label):
        name = " ".join(tokens[first : last + 1])
        places = occurrences(name, tokens)
        number = places.index((first, last)) + 1
        nearest = next(place for place in places if place[0] > after)
        lines.append(f"{name}, {kind}" + ("" if nearest == (first, last) else f" #{number}"))
        after = last
    return " " + ("\n".join(lines) or NONE)


def choices(example: Example, config: Config) -> None:
    """None: the answer is generated."""
    return


def new_tokens(config: Config) -> int:
    """The most tokens that an answer may have."""
    return config.max_new_tokens


def parse(output: str, example: Example, config: Config) -> str | None:
    """What an answer says, as `written` gives it, or None when no line of it can be read: counted,
    never dropped.

    The answer is what stands before the first empty line. `none` alone means no entity. Every other
    line is one claim: one that cannot be read, or whose name does not stand in the sentence
    (there), or that repeats a place, is a wrong one, so that rambling costs precision. White space
    is not compared; case and punctuation are.
    """
    lines = output.strip().split("\n\n")[0].splitlines()
    if len(lines) == 1 and re.sub(r"\W", "", lines[0]).lower() == NONE:
        return ""
    claims = [_claim(line, config) for line in lines]
    if not any(claims):
        return None
    tokens, after = example.text.split(" "), -1
    said: list[str] = []
    for claim in claims:
        if claim is None:
            said.append(UNREADABLE)
            continue
        name, kind, number = claim
        places = occurrences(name, tokens)
        chosen = (
            places[number - 1 : number]
            if number
            else [place for place in places if place[0] > after][:1]
        )
        item = written([(*chosen[0], kind)]) if chosen else ""
        said.append(item if item and item not in said else f"{UNREADABLE}/{kind}")
        after = chosen[0][1] if chosen else after
    return " ".join(said)


def cluster(example: Example) -> str:
    """What the bootstrap resamples: sentences; equal ones are one observation."""
    return example.text


def constant_answers(config: Config) -> tuple[str, ...]:
    """The answers that need no model: nothing anywhere, or the known words wherever they stand."""
    return NONE, *([", ".join(config.known)] if config.known else [])


def constant(answer: str, example: Example, config: Config) -> str:
    """What a constant answer predicts for an example."""
    if answer == NONE:
        return ""
    words = [
        (place, place, config.known.get(token))
        for place, token in enumerate(example.text.split(" "))
    ]
    return written([(first, last, kind) for first, last, kind in words if kind])


def tally(rows: Sequence[dict[str, Any]], config: Config) -> Float[np.ndarray, "rows cells"]:
    """Each row's counts: for each type how many entities are right, predicted and there; unreadable
    lines; 1 if unparsable; 1.

    An unparsable answer is one unreadable line: where nothing is to be found, the answer is `none`
    and not silence.
    """
    table = np.zeros((len(rows), 3 * len(config.types) + 3))
    for row, counts in zip(rows, table, strict=True):
        gold = set(written(spans(row["gold"])).split())
        said = UNREADABLE if row["prediction"] is None else row["prediction"]
        for item in said.split():
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
    """Every metric from summed tallies: micro F1, precision and recall of whole entities as in
    seqeval, each type's F1, unparsable rate.
    """
    by_type = sums[..., :-3].reshape(*sums.shape[:-1], len(config.types), 3)
    right, predicted, there = (by_type[..., column] for column in range(3))
    hits, claimed, wanted = right.sum(-1), predicted.sum(-1) + sums[..., -3], there.sum(-1)
    found = {
        "f1_entity": _share(2 * hits, claimed + wanted),
        "precision_entity": _share(hits, claimed),
        "recall_entity": _share(hits, wanted),
    }
    for position, kind in enumerate(config.types):
        found[f"f1_{kind.lower()}"] = _share(
            2 * right[..., position], (predicted + there)[..., position]
        )
    return found | {"unparsable_rate": _share(sums[..., -2], sums[..., -1])}


def spans(tags: str) -> list[Span]:
    """The entities that tags joined by spaces mean, by seqeval's definition (chunks as in
    conlleval), in their order.
    """
    return list(_spans(tags))


@cache
def _spans(tags: str) -> tuple[Span, ...]:
    from seqeval.metrics.sequence_labeling import get_entities

    return tuple(
        (int(first), int(last), str(kind)) for kind, first, last in get_entities(tags.split(" "))
    )


def written(entities: Sequence[Span]) -> str:
    """Entities as text, `first-last/TYPE` joined by spaces: what a prediction is in a row."""
    return " ".join(f"{first}-{last}/{kind}" for first, last, kind in entities)


def occurrences(name: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """(first, last) of every run of whole tokens that spells the name, white space aside, by its
    first token.
    """
    wanted = "".join(name.split())
    found = []
    for first in range(len(tokens)):
        spelled = ""
        for last in range(first, len(tokens)):
            spelled += tokens[last]
            if spelled == wanted:
                found.append((first, last))
            if not wanted.startswith(spelled) or spelled == wanted:
                break
    return found


def _claim(line: str, config: Config) -> tuple[str, str, int] | None:
    """(name, type, number of the occurrence or 0) of a line that has the form, else None."""
    name, _, rest = line.strip().rpartition(",")
    match = KIND.fullmatch(rest.strip())
    if not name.strip() or match is None or match["kind"].upper() not in config.types:
        return None
    return name, match["kind"].upper(), int(match["number"] or 0)


def _index(item: str, config: Config) -> int:
    return config.types.index(item.rpartition("/")[2])


def _share(part: Any, whole: Any) -> np.ndarray:
    """part / whole, 0 where there is nothing, as in seqeval."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)
