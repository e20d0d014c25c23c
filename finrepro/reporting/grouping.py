"""Cells grouped into the lines of a table, with their marks, evidence and reasons."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar, cast

from finrepro.reporting.cell_result import CellResult

Key = TypeVar("Key", bound=Hashable)
EVIDENCE = ("label", "run_id", "seed", "state", "reason", "weights")
SHORT_NOTE = (
    "(short): trained for too few steps to show quality; the cell proves that its path works."
)

# At the scales whose cells are not of the paper's models: in captions and below figures.
SCALE_MARKS = {
    "smoke": "SMOKE: miniatures, never to be set against published values",
    "open": "OPEN: a small open model, not one of the paper's; never to be set against "
    "published values",
}


def axis(row: CellResult, name: str) -> Any:
    """A cell's value on an axis."""
    return cast("Mapping[str, Any]", row)[name]


def grouped_by(
    rows: Sequence[CellResult], key: Callable[[CellResult], Key]
) -> list[tuple[Key, list[CellResult]]]:
    """Rows grouped by a key, groups and rows in their first order."""
    groups: dict[Key, list[CellResult]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def grouped(
    rows: Sequence[CellResult], *axes: str
) -> list[tuple[tuple[Any, ...], list[CellResult]]]:
    """Rows grouped by axes, groups and rows in their first order."""
    return grouped_by(rows, lambda row: tuple(axis(row, name) for name in axes))


def caption(text: str, scale: str) -> str:
    """A caption that says so where the cells are not of the paper's models."""
    return f"{text} - {SCALE_MARKS[scale]}" if scale in SCALE_MARKS else text


def quantizer_text(row: CellResult) -> str:
    """A cell's quantizer; `none` with the format that a package's weights were decoded from."""
    decoded = row["quantizer"] == "none" and row["decoded_from"]
    return f"none ({decoded}, decoded)" if decoded else row["quantizer"]


def decoded_notes(rows: Sequence[CellResult]) -> list[str]:
    """A line a model whose linear weights were decoded from a shorter format."""
    formats = {row["model"]: row["decoded_from"] for row in rows if row["decoded_from"]}
    return [
        f"{model}: its linear weights come as {name}. Here none is {name}, decoded, and quantizers "
        "are compared on weights that lie on that grid, not on 16-bit ones; adapters are compared "
        "on equal terms."
        for model, name in formats.items()
    ]


def evidence(rows: Sequence[CellResult], task: str | None = None) -> dict[str, Any]:
    """The evidence of a line: its cells with their run ids and unrounded values (of one task,
    where one is named).
    """
    cells = []
    for row in rows:
        scores = [score for score in row["scores"] if task is None or score["task"] == task]
        cells.append(
            {name: axis(row, name) for name in EVIDENCE} | {"scores": scores, "costs": row["costs"]}
        )
    return {"cells": cells}


def marks(rows: Sequence[CellResult]) -> str:
    """` *` for results that other source or packages made, ` (short)` for cells trained too
    briefly.
    """
    stale = any(row["state"] == "stale" for row in rows)
    return " *" * stale + " (short)" * bool(rows[0]["short"])


def reasons(rows: Sequence[CellResult]) -> list[str]:
    """A line a reason why cells have no result or a stale one, and a line a remark of their runs,
    each with the cells' labels or their number.
    """
    labels_of: dict[str, list[str]] = {}
    for row in rows:
        if row["state"] != "done":
            reason = f"{row['state']}: {row['reason']}".rstrip(": ")
            labels_of.setdefault(reason, []).append(row["label"])
    for row in rows:
        for note in row["notes"]:
            labels_of.setdefault(note, []).append(row["label"])
    texts = []
    for reason, labels in labels_of.items():
        cells = labels[0] if len(labels) == 1 else f"{len(labels)} cells, as {labels[0]}"
        texts.append(f"{'* ' if reason.startswith('stale') else ''}{cells} - {reason}")
    return texts
