"""Cells joined with their results: what the tables are made from."""

import dataclasses
from typing import Any

from finrepro.catalogue import footprint
from finrepro.catalogue.cells import expand
from finrepro.catalogue.reader import table
from finrepro.catalogue.resolve import Cell
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec, Scale
from finrepro.evidence import store
from finrepro.evidence.files import read_lines
from finrepro.evidence.place import Place
from finrepro.reporting import pretraining


def rows(cells: list[Cell], place: Place) -> list[dict[str, Any]]:
    """Cells joined with their results, as the report modules take them."""
    joined = []
    for cell in cells:
        result = place.store.result(cell.spec.run_id) or {}
        state = "refused" if cell.refusal else place.store.state(cell.spec)
        reason = (
            cell.refusal
            or result.get("reason")
            or {store.STALE: "made by other source or packages"}.get(state, "")
        )
        joined.append(
            {
                "label": cell.label,
                "run_id": cell.spec.run_id,
                "model": cell.spec.model.name,
                "quantizer": cell.spec.quantizer.name,
                "adapter": cell.spec.adapter.name,
                "adapter_kind": cell.spec.adapter.kind,
                "train_on": cell.spec.train_on.name,
                "prompts": {
                    each.task.name: getattr(each.task.config, "template", "")
                    for each in cell.spec.tasks
                },
                "tasks": [each.task.name for each in cell.spec.tasks],
                "seed": cell.spec.seed,
                "devices": cell.spec.world_size,
                "batch": cell.spec.train.global_batch_size,
                "optimizer": cell.spec.train.optimizer.name,
                "weights": cell.spec.weights,
                "notes": result.get("cell", {}).get("notes", []),
                "state": state,
                "reason": reason,
                "short": cell.spec.train.short,
                "scores": result.get("scores", []),
                "costs": result.get("costs", {}),
                "pretraining": pretraining.facts(cell.spec)
                if cell.spec.weights == "scratch"
                else {},
                "curve": _losses(cell.spec, place)
                if cell.spec.weights == "scratch" and result.get("costs")
                else [],
                "sizes": {} if cell.refusal or result.get("costs") else footprint.sizes(cell.spec),
            }
        )
    return joined


def _losses(spec: RunSpec, place: Place) -> list[dict[str, Any]]:
    return read_lines(place.store.run_folder(spec.run_id) / "loss.jsonl")


def with_neighbours(
    selection: Selection, scale: Scale, cells: list[Cell], place: Place
) -> list[dict[str, Any]]:
    """The rows of the cells, and those of the finished runs of the table that stands beside this
    one.
    """
    beside = table(selection.table).beside
    if beside is None:
        return rows(cells, place)
    other = dataclasses.replace(selection, table=beside.removeprefix("table"), only=None)
    return rows(cells, place) + [
        row for row in rows(expand(other, scale), place) if row["state"] == store.DONE
    ]
