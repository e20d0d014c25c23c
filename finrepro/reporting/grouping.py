"""Cells on their way into a table: grouped into lines, marked, set beside published values, and
their reasons gathered into notes.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

Row = dict[
    str, Any
]  # a cell joined with its result: axis names, state, reason, run_id, tasks, scores, costs or sizes
SHARES = (
    "accuracy",
)  # metrics that are a share of the test rows; only these have the sampling half-width of a share
NAMES = ("label", "run_id", "seed", "state", "reason", "weights")


def grouped(rows: Sequence[Row], *axes: str) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows grouped by axes, groups and rows in their first order."""
    order = {
        key: i for i, key in enumerate(dict.fromkeys(tuple(row[a] for a in axes) for row in rows))
    }
    ranked = sorted(rows, key=lambda row: order[tuple(row[a] for a in axes)])
    return [
        (key, list(group))
        for key, group in groupby(ranked, key=lambda row: tuple(row[a] for a in axes))
    ]


def evidence(rows: Sequence[Row], task: str | None = None) -> dict[str, Any]:
    """What stands behind a line: its cells with their run ids and unrounded values (of one task,
    where one is named).
    """
    cells = []
    for row in rows:
        scores = [score for score in row["scores"] if task is None or score["task"] == task]
        cells.append(
            {name: row[name] for name in NAMES} | {"scores": scores, "costs": row["costs"]}
        )
    return {"cells": cells}


def marks(rows: Sequence[Row]) -> str:
    """` *` behind results that other source or packages made, `(short)` behind cells trained too
    briefly.
    """
    return (" *" if any(row["state"] == "stale" for row in rows) else "") + " (short)" * bool(
        rows[0]["short"]
    )


def reasons(rows: Sequence[Row]) -> list[str]:
    """A line a reason why cells have no result or a stale one, and a line a remark that cells
    carry.
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["state"] != "done":
            found.setdefault(f"{row['state']}: {row['reason']}".rstrip(": "), []).append(
                row["label"]
            )
    for row in rows:
        for note in row["notes"]:
            found.setdefault(note, []).append(row["label"])
    texts = []
    for reason, labels in found.items():
        named = labels[0] if len(labels) == 1 else f"{len(labels)} cells, as {labels[0]}"
        texts.append(f"{'* ' if reason.startswith('stale') else ''}{named} - {reason}")
    return texts
