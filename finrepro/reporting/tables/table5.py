"""Table 5: what fine-tuning costs - parameters, memory, bytes and speed, measured in the runs
themselves.
"""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from finrepro.catalogue.published import Published
from finrepro.reporting.beside import Beside, published_evidence
from finrepro.reporting.cell_result import CellResult
from finrepro.reporting.grouping import (
    axis,
    caption,
    decoded_notes,
    evidence,
    grouped,
    quantizer_text,
    reasons,
)
from finrepro.reporting.table import Line, Table, without_columns

MEASURED: dict[str, tuple[str, Callable[[float], str]]] = {
    "Trainable": ("trainable_params", lambda value: f"{value:,.0f}"),
    "Base [GB]": ("base_bytes", lambda value: f"{value / 1e9:.4g}"),
    "Adapter file [MB]": ("trained_file_bytes", lambda value: f"{value / 1e6:.2f}"),
    "Peak memory [GiB]": ("peak_memory_bytes", lambda value: f"{value / 2**30:.2f}"),
    "Tokens/s": ("tokens_per_second", lambda value: f"{value:,.0f}"),
    "Training [s]": ("train_seconds", lambda value: f"{value:,.1f}"),
    "Useful tokens": ("useful_token_share", lambda value: f"{100 * value:.1f} %"),
}
NAMES = ("Model", "Quantizer", "Adapter", "Trained on", "Batch", "Devices")
LINE = ("model", "quantizer", "adapter", "train_on", "batch", "devices")
BESIDE = ("Published [GB]", "Comparable")
# The first in the column, the others as evidence.
PUBLISHED = ("peak_memory_gb", "trainable_params", "base_bytes")


def build(rows: Sequence[CellResult], scale: str, published: Sequence[Published] = ()) -> Table:
    """One line a configuration, seeds averaged; a run that two tables share counts once. Cells
    without a result come last, a line a reason; at paper scale each configuration has a line of
    computed sizes before them.

    Published memory stands beside cells at paper scale only, and has no verdict: its spread is not
    known.
    """
    rows = list({row["run_id"]: row for row in rows}.values())
    beside = Beside(published if scale == "paper" else ())
    lines = []
    measured = [row for row in rows if row["costs"]]
    for (model,), of_model in grouped(measured, "model"):
        lines += [_line(model, group, beside) for _, group in grouped(of_model, *LINE)]
    without = [row for row in rows if not row["costs"]]
    computed = [row for row in without if scale == "paper" and row.get("sizes")]
    lines += [
        _computed(model, group)
        for (model, *_), group in grouped(computed, "model", "quantizer", "adapter")
    ]
    for (model, state, _), group in grouped(without, "model", "state", "reason"):
        count = f"{len(group)} cells - {state}" if len(group) > 1 else f"- ({state})"
        names = (model, *(_some(group, name) for name in LINE[1:]))
        lines.append(
            Line(
                (*names, count, *[""] * (len(MEASURED) - 1), "", ""),
                "without result",
                evidence(group),
            )
        )
    columns = (*NAMES, *MEASURED, *BESIDE)
    dropped = set() if beside.notes else set(BESIDE)
    if len({row["train_on"] for row in rows}) <= 1:
        dropped.add("Trained on")
    table = Table(
        name="table5",
        label=f"table5_{scale}",
        caption=caption("Cost of fine-tuning", scale),
        columns=columns,
        lines=tuple(lines),
        notes=_notes(rows, beside),
    )
    return without_columns(table, {columns.index(column) for column in dropped})


def _line(model: str, rows: Sequence[CellResult], beside: Beside) -> Line:
    """The line of one configuration over its seeds."""
    finished = [row for row in rows if row["state"] in ("done", "stale")] or list(rows)
    texts = []
    for key, show in MEASURED.values():
        values = [row["costs"][key] for row in finished if row["costs"].get(key) is not None]
        texts.append(show(mean(values)) if values else "-")
    texts[0] += " *" if any(row["state"] == "stale" for row in finished) else ""
    pairs = beside.find(rows[0], None, PUBLISHED)
    peaks = any(value.measure.ours == PUBLISHED[0] for value, _ in pairs)
    value, _ = beside.texts(pairs, {}) if peaks else ("", "")
    level = pairs[0][1].level if peaks else ""
    shown = {name: axis(rows[0], name) for name in LINE} | {"quantizer": quantizer_text(rows[0])}
    names = tuple(map(str, shown.values()))
    return Line(
        (*names, *texts, value, level),
        model,
        evidence(rows) | (published_evidence(pairs) if pairs else {}),
    )


def _computed(model: str, rows: Sequence[CellResult]) -> Line:
    """The line of a configuration that has not run: the sizes that need no run."""
    sizes = rows[0]["sizes"]
    texts = [show(sizes[key]) if key in sizes else "-" for key, show in MEASURED.values()]
    names = (model, *(_some(rows, name) for name in LINE[1:]))
    cells = evidence(rows) | {"sizes": {row["label"]: row["sizes"] for row in rows}}
    return Line((*names, *texts, "", ""), "computed, not run", cells)


def _some(rows: Sequence[CellResult], name: str) -> str:
    """One or two values of the rows on an axis, or their number."""
    values: dict[Any, None] = dict.fromkeys(axis(row, name) for row in rows)
    return ", ".join(map(str, values)) if len(values) <= 2 else f"{len(values)} values"


def _notes(rows: Sequence[CellResult], beside: Beside) -> tuple[str, ...]:
    """How to read the table, then the reasons."""
    notes = [
        "Base: the model's bytes as they lie in memory, quantization constants included "
        "(1 GB = 10^9 bytes). Adapter file: what training writes (1 MB = 10^6).",
        "Peak memory (1 GiB = 2^30 bytes): on a GPU what the allocator held at most, on a CPU the "
        "whole process, libraries included.",
        "Batch: examples a step, over all devices. Tokens/s: trained tokens without padding, over "
        "all devices. Useful tokens: the share that is not padding.",
    ]
    if any(row.get("sizes") for row in rows):
        notes.append(
            "Computed, not run: from the architecture, exact; of the adapter file the numbers "
            "without the file's header."
        )
    if any(row["short"] for row in rows):
        notes.append("Most cells are trained for a few steps: training seconds are of those steps.")
    if any(row["weights"] == "random" for row in rows):
        notes.append("Weights may be random here: none of these columns depends on their values.")
    notes += decoded_notes(rows)
    return (*notes, *beside.below(), *reasons(rows))
