"""Cells joined with their results."""

import dataclasses
from typing import Any

from finrepro.catalogue import footprint
from finrepro.catalogue.cells import expand
from finrepro.catalogue.reader import origin, table
from finrepro.catalogue.resolve import Cell
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec, Scale
from finrepro.evidence import store
from finrepro.evidence.files import read_lines
from finrepro.evidence.place import Place
from finrepro.reporting import pretraining
from finrepro.reporting.cell_result import CellResult


def rows(cells: list[Cell], place: Place) -> list[CellResult]:
    """Each cell with its result in the store, in the same order."""
    return [_joined(cell, place) for cell in cells]


def _joined(cell: Cell, place: Place) -> CellResult:
    spec = cell.spec
    found = place.store.found(spec.run_id)
    result, state = found.result or {}, "refused" if cell.refusal else found.state
    package = origin(spec.model).package
    measured, from_scratch = bool(result.get("costs")), spec.weights == "scratch"
    return {
        "label": cell.label,
        "run_id": spec.run_id,
        "model": spec.model.name,
        "quantizer": spec.quantizer.name,
        "adapter": spec.adapter.name,
        "adapter_kind": spec.adapter.kind,
        "train_on": spec.train_on.name,
        "prompts": {
            scored.task.name: getattr(scored.task.config, "template", "") for scored in spec.tasks
        },
        "tasks": [scored.task.name for scored in spec.tasks],
        "seed": spec.seed,
        "devices": spec.world_size,
        "batch": spec.train.global_batch_size,
        "optimizer": spec.train.optimizer.name,
        "weights": spec.weights,
        "decoded_from": package.linear if package and spec.weights == "pretrained" else None,
        "notes": result.get("cell", {}).get("notes", []),
        "state": state,
        "reason": cell.refusal or result.get("reason") or _reason(found, spec, place),
        "short": spec.train.short,
        "scores": result.get("scores", []),
        "costs": result.get("costs", {}),
        "pretraining": pretraining.facts(spec) if from_scratch else {},
        "curve": _losses(spec, place) if from_scratch and measured else [],
        "sizes": {} if cell.refusal or measured else footprint.sizes(spec),
    }


def _reason(found: store.Found, spec: RunSpec, place: Place) -> str:
    """Why a result is stale, with what became of making it again, or why it is damaged."""
    if found.state != store.STALE:
        return ", ".join(found.faults)
    last = place.store.attempt(spec.run_id)
    again = f"; made again, it {last['status']}: {last['reason']}" if last else ""
    return f"made by other source or packages{again}"


def _losses(spec: RunSpec, place: Place) -> list[dict[str, Any]]:
    return read_lines(place.store.run_folder(spec.run_id) / "loss.jsonl")


def with_neighbours(
    selection: Selection, scale: Scale, cells: list[Cell], place: Place
) -> list[CellResult]:
    """The rows of the cells, and those of the finished runs of the table that this one shows as
    well (`beside`).
    """
    beside = table(selection.table).beside
    if beside is None:
        return rows(cells, place)
    neighbour = dataclasses.replace(selection, table=beside.removeprefix("table"), only=None)
    return rows(cells, place) + [
        row for row in rows(expand(neighbour, scale), place) if row["state"] == store.DONE
    ]
