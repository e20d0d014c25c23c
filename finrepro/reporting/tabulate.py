"""A table from the store: cells joined with their results, given to the report, and written as Markdown, LaTeX and JSON."""

import dataclasses
from typing import Any

from finrepro.catalogue.cells import Cell, expand, foreign_adapter
from finrepro.catalogue.reader import published, table
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec, Scale
from finrepro.evidence import store
from finrepro.evidence.place import Place
from finrepro.planning import plan
from finrepro.reporting import pretraining
from finrepro.reporting.curves import draw_charts
from finrepro.reporting.dots import draw, to_png, to_svg
from finrepro.reporting.table import Table, to_json, to_latex, to_markdown
from finrepro.settings import kind_module


def rows(cells: list[Cell], place: Place) -> list[dict[str, Any]]:
    """Cells joined with their results, as the report modules take them."""
    joined = []
    for cell in cells:
        result = place.store.result(cell.spec.run_id) or {}
        state = "refused" if cell.refusal else place.store.state(cell.spec)
        reason = (
            cell.refusal or result.get("reason") or {store.STALE: "made by other source or packages"}.get(state, "")
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
                "prompts": {each.task.name: getattr(each.task.config, "template", "") for each in cell.spec.tasks},
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
                "pretraining": pretraining.facts(cell.spec) if cell.spec.weights == "scratch" else {},
                "curve": _losses(cell.spec, place) if cell.spec.weights == "scratch" and result.get("costs") else [],
                "sizes": {} if cell.refusal or result.get("costs") else plan.sizes(cell.spec),
            }
        )
    return joined


def _losses(spec: RunSpec, place: Place) -> list[dict[str, Any]]:
    return store.read_lines(place.store.run_folder(spec.run_id) / "loss.jsonl")


def file_stem(selection: Selection) -> str:
    """Name of the table's files: a selection with other cells than the table's own has files of its own."""
    parts = [table(selection.table).report]
    parts += [name for name in ("quick", "full") if getattr(selection, name)]
    if selection.adapter:  # many folders are called checkpoint-500
        adapter = foreign_adapter(selection.adapter)
        parts.append(f"{adapter.name}_{adapter.config.sha256[:6]}")
    parts += [f"seeds{'_'.join(map(str, selection.seeds))}"] if selection.seeds else []
    parts += [f"{selection.world_size}_devices"] if selection.world_size else []
    return "-".join(parts + (["random_weights"] if selection.weights == "random" else []))


def tabulate(selection: Selection, scale: Scale, cells: list[Cell], place: Place) -> Table:
    """The table of the selected cells; the files, its figure among them, hold all of its cells, whichever --only selected."""
    report = kind_module("report", table(selection.table).report)
    values = published() if scale == "paper" else ()
    everything = cells if selection.only is None else expand(dataclasses.replace(selection, only=None), scale)
    shown = _with_neighbours(selection, scale, everything, place)
    whole: Table = report.build(shown, scale, values)
    files = {"md": to_markdown(whole).encode(), "tex": to_latex(whole).encode(), "json": to_json(whole).encode()}
    if hasattr(report, "panels") and any(row["scores"] for row in shown):
        picture = draw(report.panels(shown), whole.title)
        files |= {"svg": to_svg(picture).encode(), "png": to_png(picture)}
    if hasattr(report, "charts") and (charts := report.charts(shown)):
        picture = draw_charts(charts, whole.title, columns=2)
        files |= {"svg": to_svg(picture).encode(), "png": to_png(picture)}
    folder = place.store.results / "tables" / scale
    with store.disk_errors(place.store.root):
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in files.items():
            store.write_bytes(folder / f"{file_stem(selection)}.{suffix}", content)
    if everything is cells:
        return whole
    asked_for: Table = report.build(_with_neighbours(selection, scale, cells, place), scale, values)
    return asked_for


def _with_neighbours(selection: Selection, scale: Scale, cells: list[Cell], place: Place) -> list[dict[str, Any]]:
    """The rows of the cells, and those of the finished runs of the table that stands beside this one."""
    beside = table(selection.table).beside
    if beside is None:
        return rows(cells, place)
    other = dataclasses.replace(selection, table=beside.removeprefix("table"), only=None)
    return rows(cells, place) + [row for row in rows(expand(other, scale), place) if row["state"] == store.DONE]
