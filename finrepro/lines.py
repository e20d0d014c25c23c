"""Cells on their way into a table: grouped into lines, marked, set beside published values, and their reasons gathered into notes."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from finrepro.published import LEVELS, Comparison, Published, candidates, comparability
from finrepro.verdict import Estimate, half_width, judge

Row = dict[str, Any]  # a cell joined with its result: axis names, state, reason, run_id, tasks, scores, costs
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
    """The published value beside a line. Reasons are numbered, and stand once below the table."""

    def __init__(self, published: Sequence[Published]) -> None:
        self.published = published
        self.notes: dict[str, int] = {}

    def find(
        self, row: Row, task: str | None, metrics: Sequence[str], n: int | None = None
    ) -> list[tuple[Published, Comparison]]:
        """Every value that a reader would look for here, the most comparable first, then in the order of `metrics`."""
        pairs = [(each, comparability(each, row, n)) for each in candidates(self.published, row, task, metrics)]
        return sorted(pairs, key=lambda pair: (LEVELS.index(pair[1].level), metrics.index(str(pair[0].measure.ours))))

    def texts(self, pairs: Sequence[tuple[Published, Comparison]], ours: dict[str, Estimate]) -> tuple[str, str]:
        """The texts of the columns Published and Verdict: of the most comparable value."""
        if not pairs:
            return "", ""
        value, comparison = pairs[0]
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

    def _number(self, value: Published, comparison: Comparison) -> int | None:
        if not comparison.reasons:
            return None
        test = f" on {value.test_set.n:,} rows" if value.test_set.n else ""
        said = f"{value.source}: {value.system.variant}, {value.system.method}{test}"
        text = f"{said} - {comparison.level}: {'; '.join(comparison.reasons)}."
        return self.notes.setdefault(text, len(self.notes) + 1)

    def below(self) -> list[str]:
        """The numbered reasons."""
        return [f"[{number}] {text}" for text, number in self.notes.items()]


def margin_of(value: Published) -> float | None:
    """How far from it counts as equal, or None where its spread is unknown."""
    if value.margin is None or value.test_set.n is None:
        return None
    return value.margin.half_widths * half_width(value.value, value.test_set.n)


def published_evidence(pairs: Sequence[tuple[Published, Comparison]]) -> dict[str, Any]:
    """For the JSON: every value that was considered, with what was found about it."""
    return {
        "published": [asdict(value) | asdict(comparison) | {"margin": margin_of(value)} for value, comparison in pairs]
    }
