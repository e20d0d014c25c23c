"""The content of result.json: what every result has, finished or not."""

import time
from typing import cast

from finrepro.catalogue.spec import RunSpec
from finrepro.evidence import files, provenance, schema
from finrepro.evidence.schema_cell import Attention, Layout
from finrepro.evidence.schema_spec import Spec
from finrepro.evidence.store import Store
from finrepro.kinds import quantizer_of


def header(
    spec: RunSpec,
    status: str,
    reason: str | None,
    started: float,
    device: str | None = None,
    layout: Layout | None = None,
    attention: Attention | None = None,
) -> schema.Result:
    """What every result.json has, finished or not: `device` is the kind that it ran on, `layout`
    what finrepro.training.layout chose, `attention` which implementation computed.
    """
    remark = quantizer_of(spec.quantizer).note(device) if device else None
    return {
        "format": schema.FORMAT,
        "run_id": spec.run_id,
        "label": spec.label,
        "status": cast(schema.Status, status),
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
            "notes": [remark] if remark else [],
        },
        "spec": cast(Spec, spec.canonical()),
        "started": started,
        "ended": time.time(),
        "scores": [],
        "costs": {},
        "data": {},
        "environment": provenance.environment(),
    }


def seal_unfinished(
    spec: RunSpec,
    place: Store,
    status: str,
    reason: str,
    started: float,
    trace: str | None = None,
) -> schema.Result:
    """Record that a cell failed, diverged or was skipped, and why; `trace` goes into error.txt."""
    result = header(spec, status, reason, started)
    with place.new_run(spec.run_id) as folder:
        files.write_json(folder / "result.json", result)
        if trace:
            (folder / "error.txt").write_text(trace, encoding="utf-8")
    return result
