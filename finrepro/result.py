"""The content of result.json: what every result has, finished or not."""

import time
from typing import Any

from finrepro import provenance, store
from finrepro.spec import RunSpec
from finrepro.store import Store


def header(spec: RunSpec, status: str, reason: str | None, started: float) -> dict[str, Any]:
    """What every result.json has, finished or not."""
    return {
        "format": store.FORMAT,
        "run_id": spec.run_id,
        "label": spec.label,
        "status": status,
        "reason": reason,
        "cell": {
            "model": spec.model.name,
            "quantizer": spec.quantizer.name,
            "adapter": spec.adapter.name,
            "train_on": spec.train_on.task.name,
            "seed": spec.seed,
            "scale": spec.model.scale,
            "weights": spec.weights,
        },
        "spec": spec.canonical(),
        "started": started,
        "ended": time.time(),
        "scores": [],
        "costs": {},
        "data": {},
        "environment": provenance.environment(),
    }


def seal_unfinished(
    spec: RunSpec, place: Store, status: str, reason: str, started: float, detail: str | None = None
) -> dict[str, Any]:
    """Record that a cell failed, diverged or was skipped, and why."""
    result = header(spec, status, reason, started)
    with place.new_run(spec.run_id) as target:
        store.write_json(target / "result.json", result)
        if detail:
            (target / "error.txt").write_text(detail, encoding="utf-8")
    return result
