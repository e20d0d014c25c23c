"""The scores of a store as a pandas frame, for notebooks and analyses of one's own."""

from typing import TYPE_CHECKING, Any

from finrepro.evidence.store import Store

if TYPE_CHECKING:
    import pandas

CELL = ("model", "quantizer", "adapter", "train_on", "seed", "weights", "devices", "batch")
SCORE = (
    "task",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "constant",
    "constant_answer",
    "gain",
    "gain_low",
    "gain_high",
)
COLUMNS = ("run_id", "label", "scale", "state", "reason", *CELL, *SCORE)


def scores(store: Store) -> "pandas.DataFrame":
    """One row a run, task and metric, in the order of run ids.

    `scale` is `smoke`, `open` or `paper`: numbers of two are never set against each other. `state`
    is `done`, `stale` (made by other source or packages), `failed`, `diverged`, `skipped` or
    `damaged` (not what was sealed: no numbers), with its `reason`. `value` lies in the
    bootstrap's 95 % interval from `low` to `high` over `n` examples; `gain` is what it lies
    above `constant`, the score of the best constant answer. A run without scores has one row
    whose task, metric and numbers are missing.
    """
    import pandas

    rows: list[dict[str, Any]] = []
    for folder in sorted((store.results / "runs").glob("[!.]*")):
        found = store.found(folder.name)
        result = found.result
        if result is None:
            reason = ", ".join(found.faults)
            rows.append({"run_id": folder.name, "state": found.state, "reason": reason})
            continue
        cell = result["cell"]
        run = {
            "run_id": result["run_id"],
            "label": result["label"],
            "scale": cell["scale"],
            "state": found.state,
            "reason": result["reason"],
            **{name: cell.get(name) for name in CELL},
        }
        rows += [
            run | {name: score.get(name) for name in SCORE} for score in result["scores"] or [{}]
        ]
    return pandas.DataFrame(rows, columns=list(COLUMNS))
