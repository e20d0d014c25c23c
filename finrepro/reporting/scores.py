"""The scores of cells: a task's metrics, a cell's score, and seeds as one estimate."""

from collections.abc import Sequence
from typing import Any, Literal

from finrepro.reporting.cell_result import CellResult
from finrepro.statistics.equivalence import Estimate, estimate

# A task's family is that of its main metric, the first here that was scored; the other metrics
# follow in one column.
FAMILIES = {
    "accuracy": ("f1_weighted", "f1_macro", "mcc"),
    "f1_entity": ("precision_entity", "recall_entity", "unparsable_rate"),
}


THIRD_DECIMAL_BELOW = 0.02  # an interval's width


def metrics_of(rows: Sequence[CellResult], task: str) -> tuple[str, ...]:
    """The task's metrics, the main one first: those of its family, or the first that was scored
    where it has none here.
    """
    scored = dict.fromkeys(s["metric"] for row in rows for s in row["scores"] if s["task"] == task)
    for main, further in FAMILIES.items():
        if main in scored:
            return (main, *further)
    return tuple(scored)[:1]


def score_of(row: CellResult, task: str, metric: str) -> dict[str, Any] | None:
    """The row's score for a task and a metric, None without one. Random weights have no quality,
    whatever was scored.
    """
    if row["weights"] == "random":
        return None
    return next((s for s in row["scores"] if s["metric"] == metric and s["task"] == task), None)


def estimate_of(scores: Sequence[dict[str, Any]]) -> Estimate:
    """The seeds' scores as one estimate."""
    values, lows, highs = ([score[key] for score in scores] for key in ("value", "low", "high"))
    return estimate(values, lows, highs, scores[0]["n"])


def bounds(low: float, high: float, sign: Literal["", "+"] = "") -> str:
    """An interval as text, `sign` as in a format.

    A bound that 1,000 resamples give is uncertain by a 45th of the interval's width, one standard
    deviation: a third decimal stands where that is below half of its unit.
    """
    digits = 3 if high - low < THIRD_DECIMAL_BELOW else 2
    return f"[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
