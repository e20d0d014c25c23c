"""Cells on their way into a table: grouped into lines, marked, set beside published values, and their reasons gathered into notes."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from finrepro.catalogue.published import LEVELS, Comparison, Published, candidates, comparability
from finrepro.statistics.equivalence import Estimate, half_width, judge

Row = dict[str, Any]  # a cell joined with its result: axis names, state, reason, run_id, tasks, scores, costs or sizes
SHARES = ("accuracy",)  # metrics that are a share of the test rows; only these have the sampling half-width of a share
NAMES = ("label", "run_id", "seed", "state", "reason", "weights")


def grouped(rows: Sequence[Row], *axes: str) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows grouped by axes, groups and rows in their first order."""
    order = {key: i for i, key in enumerate(dict.fromkeys(tuple(row[a] for a in axes) for row in rows))}
    ranked = sorted(rows, key=lambda row: order[tuple(row[a] for a in axes)])
    return [(key, list(group)) for key, group in groupby(ranked, key=lambda row: tuple(row[a] for a in axes))]


def evidence(rows: Sequence[Row], task: str | None = None) -> dict[str, Any]:
    """What stands behind a line: its cells with their run ids and unrounded values (of one task, where one is named)."""
    cells = []
    for row in rows:
        scores = [score for score in row["scores"] if task is None or score["task"] == task]
        cells.append({name: row[name] for name in NAMES} | {"scores": scores, "costs": row["costs"]})
    return {"cells": cells}


def marks(rows: Sequence[Row]) -> str:
    """` *` behind results that other source or packages made, `(short)` behind cells trained too briefly."""
    return (" *" if any(row["state"] == "stale" for row in rows) else "") + " (short)" * bool(rows[0]["short"])


def reasons(rows: Sequence[Row]) -> list[str]:
    """A line a reason why cells have no result or a stale one, and a line a remark that cells carry."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["state"] != "done":
            found.setdefault(f"{row['state']}: {row['reason']}".rstrip(": "), []).append(row["label"])
    for row in rows:
        for note in row["notes"]:
            found.setdefault(note, []).append(row["label"])
    texts = []
    for reason, labels in found.items():
        named = labels[0] if len(labels) == 1 else f"{len(labels)} cells, as {labels[0]}"
        texts.append(f"{'* ' if reason.startswith('stale') else ''}{named} - {reason}")
    return texts


class Beside:
    """The published value beside a line. Values are numbered, and so are the reasons they share: each stands once below the table."""

    def __init__(self, published: Sequence[Published]) -> None:
        self.published = published
        self.notes: dict[str, int] = {}
        self.reasons: dict[str, str] = {}  # reason -> r1, r2, ...
        self.unseen: dict[str, dict[str, None]] = {}  # reason -> not comparable values that stand in the JSON alone

    def find(
        self, row: Row, task: str | None, metrics: Sequence[str], n: int | None = None
    ) -> list[tuple[Published, Comparison]]:
        """Every value that a reader would look for here, the most comparable first, then in the order of `metrics`."""
        pairs = [(each, comparability(each, row, n)) for each in candidates(self.published, row, task, metrics)]
        rank = {metric: place for place, metric in enumerate(metrics)}
        return sorted(
            pairs,
            key=lambda pair: (LEVELS.index(pair[1].level), rank.get(pair[0].measure.ours or "", len(metrics))),
        )

    def texts(self, pairs: Sequence[tuple[Published, Comparison]], ours: dict[str, Estimate]) -> tuple[str, str]:
        """The texts of the columns Published and Verdict: of the most comparable value."""
        if not pairs:
            return "", ""
        value, comparison = pairs[0]
        self._gather(comparison.reasons, pairs[1:])
        number = self._number(value, comparison)
        mark = f" [{number}]" if number else ""
        text = f"{value.metric} {value.value:g}, {value.name.split('.')[0]}{mark}"
        if comparison.level == "not comparable":
            return text, "not comparable"
        margin = margin_of(value)
        if margin is None:
            return text, "no margin is known"
        judgement = judge(ours.get(str(value.measure.ours)), value.value, margin)
        reserve = " with reservations" if comparison.level == "with reservations" else ""
        return text, f"{judgement.verdict}{reserve}: {judgement.text}"

    def _gather(self, known: Sequence[str], others: Sequence[tuple[Published, Comparison]]) -> None:
        """Keep why the values that are not shown are not comparable, for what the shown one does not say already."""
        for value, comparison in others:
            if comparison.level == "not comparable":
                for reason in comparison.reasons:
                    if reason not in known:
                        self.unseen.setdefault(reason, {})[value.name] = None

    def _number(self, value: Published, comparison: Comparison) -> int | None:
        if not comparison.reasons:
            return None
        test = f" on {value.test_set.n:,} rows" if value.test_set.n else ""
        said = f"{value.source}: {value.system.variant}, {value.system.method}{test}"
        text = f"{said} - {comparison.level}: {', '.join(map(self._key, comparison.reasons))}."
        return self.notes.setdefault(text, len(self.notes) + 1)

    def _key(self, reason: str) -> str:
        return self.reasons.setdefault(reason, f"r{len(self.reasons) + 1}")

    def below(self) -> list[str]:
        """The numbered values, then what stands in the JSON alone, then the reasons."""
        texts = [f"[{number}] {text}" for text, number in self.notes.items()]
        for reason, names in self.unseen.items():
            named = next(iter(names)) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            texts.append(f"Published, in the JSON only: {named} - not comparable: {self._key(reason)}.")
        return texts + [f"{key}: {reason}." for reason, key in self.reasons.items()]


def margin_of(value: Published) -> float | None:
    """How far from it counts as equal, or None where its spread is unknown. An F1 is no share of rows: its spread is no binomial's."""
    if value.margin is None or value.test_set.n is None or value.measure.ours not in SHARES:
        return None
    return value.margin.half_widths * half_width(value.value, value.test_set.n)


def published_evidence(pairs: Sequence[tuple[Published, Comparison]]) -> dict[str, Any]:
    """For the JSON: every value that was considered, with what was found about it."""
    return {
        "published": [asdict(value) | asdict(comparison) | {"margin": margin_of(value)} for value, comparison in pairs]
    }
