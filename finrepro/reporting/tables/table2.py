"""Table 2: pretraining - dense models, low-rank ones, and dense ones of the same size, compared at
equal tokens, time and parameters.
"""

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from finrepro.catalogue.published import Published
from finrepro.reporting.cell_result import CellResult
from finrepro.reporting.curves import Chart, Curve
from finrepro.reporting.grouping import (
    SHORT_NOTE,
    caption,
    evidence,
    grouped,
    grouped_by,
    marks,
    reasons,
)
from finrepro.reporting.loss_curve import LossCurve, loss_curve
from finrepro.reporting.scores import bounds
from finrepro.reporting.table import Line, Table
from finrepro.statistics.equivalence import Estimate, estimate

LINE = ("model", "adapter", "optimizer")
COLUMNS = (
    "Model",
    "Method",
    "Parameters",
    "Fewer",
    "MB at 16 / 8 / 4 bit",
    "Speed-up, bound",
    "Tokens/s (ms a step)",
    "MFU",
    "Peak [GiB]",
    "Loss (seeds)",
    "At equal time",
    "Bits a byte",
    "In int8 / nf4",
)
COMPUTED = 5  # columns that need no run


def build(rows: Sequence[CellResult], scale: str, published: Sequence[Published] = ()) -> Table:
    """The table of the rows, without published values: no perplexity of FinGPT-HPC could be
    read.
    """
    finished = [row for row in rows if row["costs"]]
    lines = []
    for reference, family in grouped_by(finished, _reference):
        moment = equal_time(family)
        speeds = [row["costs"]["tokens_per_second"] for row in family if _is_reference(row)]
        for _, group in grouped(family, *LINE):
            lines.append(_line(group, reference, moment, mean(speeds) if speeds else None))
    for (model, state, _), group in grouped(
        [row for row in rows if not row["costs"]], "model", "state", "reason"
    ):
        lines += [_without(model, state, same) for _, same in grouped(group, *LINE)]
    return Table(
        name="table2",
        label=f"table2_{scale}",
        caption=caption("Pretraining with low-rank layers", scale),
        columns=COLUMNS,
        lines=tuple(lines),
        notes=_notes(rows, finished),
    )


def charts(rows: Sequence[CellResult]) -> tuple[Chart, ...]:
    """The training loss by tokens and by time: for each family a chart of both, a line a
    configuration (its first seed).
    """
    panels = []
    for reference, family in grouped_by(rows, _reference):
        drawn = [
            (group[0], _curve(group[0]))
            for _, group in grouped(family, *LINE)
            if group[0].get("curve")
        ]
        for axis, name in (("tokens", "tokens"), ("seconds", "seconds of training")):
            traces = tuple(
                Curve(_legend(row), getattr(curve, axis), curve.losses) for row, curve in drawn
            )
            if traces:
                title = f"{reference} and what stands beside it"
                panels.append(Chart(title, name, "training loss", traces))
    return tuple(panels)


def _reference(row: CellResult) -> str:
    """The dense model that a cell is compared with."""
    return str(row["pretraining"]["reference"])


def equal_time(rows: Sequence[CellResult]) -> float | None:
    """Seconds of training of the fastest configuration: every other's curve reaches them."""
    times = [
        mean(row["costs"]["train_seconds"] for row in group) for _, group in grouped(rows, *LINE)
    ]
    return min(times) if len(times) > 1 else None


def loss(row: CellResult, suffix: str = "") -> tuple[float, float, float] | None:
    """Nats a token on the scored text, with its interval over the text; None where it was not
    scored. `suffix`: `.int8` for the model stored as int8.
    """
    tasks = [task + suffix for task in row["tasks"]]
    for score in row["scores"]:
        if score["metric"] == "perplexity" and score["task"] in tasks:
            return math.log(score["value"]), math.log(score["low"]), math.log(score["high"])
    return None


def _line(
    rows: Sequence[CellResult], reference: str, moment: float | None, dense_speed: float | None
) -> Line:
    """A configuration over its seeds."""
    facts = rows[0]["pretraining"]
    speed = mean(row["costs"]["tokens_per_second"] for row in rows)
    steps = [row["costs"]["step_seconds"] for row in rows if row["costs"].get("step_seconds")]
    at_equal_time = [
        value
        for row in rows
        if moment and (value := _curve(row).at(min(moment, _last(row)))) is not None
    ]
    estimates = {suffix: _estimate(rows, suffix) for suffix in ("", ".int8", ".nf4")}
    bits = [
        s["value"]
        for row in rows
        for s in row["scores"]
        if s["metric"] == "bits_per_byte" and s["task"] in row["tasks"]
    ]
    faster = (
        f"{speed / dense_speed:.2f}x of {facts['flop_bound']:.2f}x"
        if dense_speed
        else f"- of {facts['flop_bound']:.2f}x"
    )
    plain = estimates[""]
    stored = [
        f"{quantized.value - plain.value:+.3f}" if quantized and plain else "-"
        for quantized in (estimates[".int8"], estimates[".nf4"])
    ]
    texts = (
        *_computed(rows[0]),
        faster,
        f"{speed:,.0f} ({1000 * mean(steps):,.0f})" if steps else f"{speed:,.0f}",
        _mfu(rows, facts, speed),
        f"{max(row['costs']['peak_memory_bytes'] for row in rows) / 2**30:.2f}",
        f"{plain.value:.3f} {bounds(plain.low, plain.high)} ({len(rows)}){marks(rows)}"
        if plain
        else "-",
        f"{mean(at_equal_time):.3f}" if at_equal_time else "-",
        f"{mean(bits):.3f}" if bits else "-",
        " / ".join(stored),
    )
    return Line(
        texts, reference, evidence(rows) | {"pretraining": facts, "equal_time_seconds": moment}
    )


def _without(model: str, state: str, rows: Sequence[CellResult]) -> Line:
    """A configuration without a result: its computed columns, and its state."""
    rest = (f"- ({state})", *[""] * (len(COLUMNS) - COMPUTED - 1))
    return Line(
        (*_computed(rows[0]), *rest),
        f"without result: {model}",
        evidence(rows) | {"pretraining": rows[0]["pretraining"]},
    )


def _computed(row: CellResult) -> tuple[str, ...]:
    """The columns that need no run."""
    facts = row["pretraining"]
    stored = " / ".join(map(_megabytes, facts["stored_bytes"].values()))
    rank = f" (rank {facts['rank']})" if facts["rank"] else ""
    saved = "1" if math.isclose(facts["compression"], 1) else f"{facts['compression']:.2f}x"
    return (row["model"] + rank, _method(row), f"{facts['parameters']:,}", saved, stored)


def _megabytes(size: int | None) -> str:
    """Three digits of 10^6 bytes; "-" where the quantizer cannot store the model."""
    if size is None:
        return "-"
    return f"{size / 1e6:,.3g}" if size < 1e9 else f"{size / 1e6:,.0f}"


def _method(row: CellResult) -> str:
    """The trained parameters' adapter, and the optimizer where that is not AdamW."""
    return row["adapter"] + (f", {row['optimizer']}" if row["optimizer"] != "adamw" else "")


def _is_reference(row: CellResult) -> bool:
    """The dense model itself, trained plainly."""
    return bool(
        row["model"] == row["pretraining"]["reference"]
        and row["adapter"] == "full"
        and row["optimizer"] == "adamw"
    )


def _estimate(rows: Sequence[CellResult], suffix: str) -> Estimate | None:
    """The loss over the seeds; None where no seed was scored."""
    scored = [(bounds, row) for row in rows if (bounds := loss(row, suffix))]
    if not scored:
        return None
    n = next(s["n"] for s in scored[0][1]["scores"] if s["metric"] == "perplexity")
    values, lows, highs = zip(*(bounds for bounds, _ in scored), strict=True)
    return estimate(values, lows, highs, n)


def _mfu(rows: Sequence[CellResult], facts: dict[str, Any], speed: float) -> str:
    """MFU of the device's own measured matmul rate, by both conventions."""
    rates = [row["costs"]["matmul_flops"] for row in rows if row["costs"].get("matmul_flops")]
    if not rates:
        return "-"
    peak = mean(rates) * rows[0]["devices"]
    shares = [speed * flops / peak for flops in facts["flops_per_token"].values()]
    return " / ".join(f"{100 * share:.0f}" for share in shares) + " %"


def _curve(row: CellResult) -> LossCurve:
    return loss_curve(row["curve"], row["costs"]["train_tokens"])


def _last(row: CellResult) -> float:
    return float(row["curve"][-1]["seconds"]) if row["curve"] else 0.0


def _legend(row: CellResult) -> str:
    method = _method(row).removeprefix("full").removeprefix(", ")
    return f"{row['model']}, {method}" if method else str(row["model"])


def _notes(rows: Sequence[CellResult], finished: Sequence[CellResult]) -> tuple[str, ...]:
    """How to read the table, then the reasons."""
    corpora = dict.fromkeys(title for row in rows for title in row["pretraining"]["scored_on"])
    notes = [
        "Loss: nats a token on text that was not trained on, after the same number of tokens; "
        "interval: bootstrap over articles, over several seeds with the spread between runs "
        "(Student's t), with as many decimals as 1,000 resamples carry. Bits a byte do not depend "
        "on the tokenizer.",
        f"Scored on {'; '.join(corpora)}: every paragraph by itself, from its first token, without "
        "headings. It is not the usual strided perplexity over the joined text, and not to be set "
        "beside one.",
        "At equal time: the training loss (mean of ten steps, each text seen once, constant "
        "learning rate) when the fastest line of its group was done; it has other texts than the "
        "column Loss, and compares within its group alone.",
        "Equal parameters: the dense line of the same group whose parameters are those of a "
        "low-rank line.",
        "Fewer: parameters of the whole model against the group's dense one. MB: stored bytes "
        "(10^6) with scales, embeddings and head in 16 bit. In int8 / nf4: what the loss gains "
        "when the trained model is stored so; rows that 64 does not divide have no nf4, runs on "
        "several devices neither.",
        "Peak: on a GPU what the allocator held at most; on a CPU the whole process, libraries and "
        "what earlier cells left included, so that small models do not differ there.",
        "Speed-up: tokens/s against the dense model trained plainly; the bound is how many times "
        "fewer FLOPs a token takes. Cells that run side by side (--jobs) slow one another: times "
        "are to be compared between runs of --jobs 1.",
    ]
    if any(row["costs"].get("matmul_flops") for row in finished):
        notes.append(
            "MFU: model FLOPs of PaLM's convention / with causal attention, as a share of the "
            "matmul rate that the same device reached in the same run (in the model's dtype): no "
            "hardware peak is assumed."
        )
    if any(len({row["seed"] for row in group}) == 1 for _, group in grouped(finished, *LINE)):
        notes.append("Loss (1): a single seed says nothing about the spread between runs.")
    if any(row["short"] for row in finished):
        notes.append(SHORT_NOTE)
    return (*notes, *reasons(rows))
