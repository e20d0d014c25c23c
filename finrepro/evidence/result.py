"""The content of result.json: what every result has, finished or not."""

import time
from typing import Any

from finrepro.catalogue.spec import RunSpec
from finrepro.evidence import files, provenance, store
from finrepro.evidence.store import Store
from finrepro.kinds import quantizer_of


def header(
    spec: RunSpec,
    status: str,
    reason: str | None,
    started: float,
    device: str | None = None,
    layout: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What every result.json has, finished or not: `device` is the kind that it ran on, `layout`
    what finrepro.training.layout settled.
    """
    said = quantizer_of(spec.quantizer).note(device) if device else None
    attention = _attention(spec, device, layout) if device else None
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
            "train_on": spec.train_on.name,
            "seed": spec.seed,
            "scale": spec.model.scale,
            "weights": spec.weights,
            "devices": spec.world_size,
            "batch": spec.train.global_batch_size,
            "device_type": device,
            "attention": attention,
            "layout": layout,
            "compilation": [],  # one proof a process that trained, where the setting asks for one
            "notes": [said] if said else [],
        },
        "spec": spec.canonical(),
        "started": started,
        "ended": time.time(),
        "scores": [],
        "costs": {},
        "data": {},
        "environment": provenance.environment(),
    }


def _attention(spec: RunSpec, device: str, layout: dict[str, Any] | None) -> dict[str, str | None]:
    """Which implementation of attention training and evaluation used; None where there was none.
    Only training has rows of segments.
    """
    import torch

    from finrepro.methods.layers.isolated_attention import implementation

    dtype, bins = (
        getattr(torch, spec.model.dtype),
        (layout or {"used": spec.train.layout})["used"] == "bins",
    )
    return {
        "train": implementation(bins, device, dtype) if spec.train.max_steps else None,
        "evaluate": implementation(False, device, dtype) if spec.tasks else None,
    }


def seal_unfinished(
    spec: RunSpec, place: Store, status: str, reason: str, started: float, detail: str | None = None
) -> dict[str, Any]:
    """Record that a cell failed, diverged or was skipped, and why."""
    result = header(spec, status, reason, started)
    with place.new_run(spec.run_id) as target:
        files.write_json(target / "result.json", result)
        if detail:
            (target / "error.txt").write_text(detail, encoding="utf-8")
    return result
