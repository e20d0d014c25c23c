"""Table 3: the quality of every model x adapter x quantizer on the financial tasks."""

from collections.abc import Sequence
from itertools import groupby
from statistics import mean, stdev
from typing import Any

from finrepro.render import Line, Table

METRICS = {"accuracy": "Accuracy [95 %]", "f1_weighted": "F1 weighted", "f1_macro": "F1 macro", "mcc": "MCC"}
COLUMNS = ("Task", "Model", "Quantizer", "Adapter", *METRICS.values(), "Over constant", "n", "Seeds")

Row = dict[str, Any]  # a cell: axis names, state, reason, run_id, scores


def build(rows: Sequence[Row], scale: str) -> Table:
    """One line a (task, model, quantizer, adapter), seeds averaged; the best constant answer heads each task.

    `rows` are cells joined with their results. Cells without a score keep their line, with the reason where the scores would be.
    """
    lines: list[Line] = []
    refused, rows_shown = [r for r in rows if r["state"] == "refused"], [r for r in rows if r["state"] != "refused"]
    for task, of_task in _grouped(rows_shown, "train_on"):
        head = _constant(task, of_task)
        lines += [head] if head else []
        for _, of_line in _grouped(of_task, "model", "quantizer", "adapter"):
            lines.append(_line(task, of_line))
    smoke = scale == "smoke"
    caption = "Table 3. Financial tasks" + (
        " - SMOKE: miniatures, never to be set against published values" if smoke else ""
    )
    return Table(
        label=f"table3_{scale}",
        caption=caption,
        columns=COLUMNS,
        lines=tuple(lines),
        notes=_notes([*rows_shown, *refused]),
    )


def _grouped(rows: Sequence[Row], *axes: str) -> list[tuple[Any, list[Row]]]:
    """Rows grouped by axes, groups and rows in their first order."""
    order = {key: i for i, key in enumerate(dict.fromkeys(tuple(row[a] for a in axes) for row in rows))}
    ranked = sorted(rows, key=lambda row: order[tuple(row[a] for a in axes)])
    groups = [(key, list(group)) for key, group in groupby(ranked, key=lambda row: tuple(row[a] for a in axes))]
    return [(key[0] if len(axes) == 1 else key, group) for key, group in groups]


def _score(row: Row, metric: str) -> dict[str, Any] | None:
    """The row's score for a metric, None without one."""
    return next((s for s in row["scores"] if s["metric"] == metric and s["task"] == row["train_on"]), None)


def _constant(task: str, rows: Sequence[Row]) -> Line | None:
    """The line of the best constant answer, taken from any scored cell of the task."""
    scored = next((row for row in rows if _score(row, "accuracy")), None)
    if scored is None:
        return None
    scores = {metric: _score(scored, metric) for metric in METRICS}
    accuracy = scores["accuracy"]
    assert accuracy is not None
    texts = [f"{score['constant']:.3f}" if score else "" for score in scores.values()]
    name = f"always {accuracy['constant_answer']}"
    return Line((task, name, "", "", *texts, "", str(accuracy["n"]), ""), section=task)


def _line(task: str, rows: Sequence[Row]) -> Line:
    """The line of one model x quantizer x adapter over its seeds."""
    first = rows[0]
    names = (task, first["model"], first["quantizer"], first["adapter"])
    scored = [row for row in rows if _score(row, "accuracy")]
    evidence = {
        "cells": [
            {key: row[key] for key in ("label", "run_id", "seed", "state", "reason", "scores", "costs")} for row in rows
        ]
    }
    if not scored:
        return Line((*names, f"- ({first['state']})", "", "", "", "", "", ""), section=task, evidence=evidence)
    values = {metric: [_score(row, metric) for row in scored] for metric in METRICS}
    accuracy = [score for score in values["accuracy"] if score]
    mark = (" *" if any(row["state"] != "done" for row in rows) else "") + (" (short)" if first["short"] else "")
    gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(
        *(mean(s[key] for s in accuracy) for key in ("gain", "gain_low", "gain_high"))
    )
    texts = [f"{mean(score['value'] for score in scores if score):.3f}" for scores in values.values()]
    texts[0] += f" [{mean(s['low'] for s in accuracy):.3f}, {mean(s['high'] for s in accuracy):.3f}]{mark}"
    seeds = str(len(scored)) if len(scored) == 1 else f"{len(scored)} (sd {stdev(s['value'] for s in accuracy):.3f})"
    return Line((*names, *texts, gain, str(accuracy[0]["n"]), seeds), section=task, evidence=evidence)


def _notes(rows: Sequence[Row]) -> tuple[str, ...]:
    """How to read the intervals, and every cell that has no score or is stale, with its reason."""
    notes = [
        "Task: trained on its training split, scored on its test split. The first line is the best constant answer.",
        "Intervals: bootstrap over test examples, equal texts resampled together; over several seeds, their mean bounds.",
    ]
    if any(len({row["seed"] for row in group}) == 1 for _, group in _grouped(rows, "model", "quantizer", "adapter")):
        notes.append("A single seed says nothing about the spread between runs.")
    if any(row["short"] for row in rows):
        notes.append("(short): trained for too few steps to show quality; the cell proves that its path works.")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["state"] != "done":
            reasons.setdefault(f"{row['state']}: {row['reason']}".rstrip(": "), []).append(row["label"])
    for reason, labels in reasons.items():
        named = labels[0] if len(labels) == 1 else f"{len(labels)} cells, as {labels[0]}"
        notes.append(f"{'* ' if reason.startswith('stale') else ''}{named} - {reason}")
    return tuple(notes)
