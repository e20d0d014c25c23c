"""A table from the store: cells joined with their results, given to the report, and written as Markdown, LaTeX and JSON."""

import dataclasses
from typing import Any

from finrepro import store
from finrepro.catalogue import table
from finrepro.cells import Cell, Selection, expand
from finrepro.render import Table, to_json, to_latex, to_markdown
from finrepro.run import Place
from finrepro.schema import kind_module
from finrepro.spec import Scale


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
                "train_on": cell.spec.train_on.task.name,
                "seed": cell.spec.seed,
                "state": state,
                "reason": reason,
                "short": cell.spec.train.short,
                "scores": result.get("scores", []),
                "costs": result.get("costs", {}),
            }
        )
    return joined


def file_stem(selection: Selection) -> str:
    """Name of the table's files: the short cells of --quick have files of their own."""
    return table(selection.table).report + ("-quick" if selection.quick else "")


def tabulate(selection: Selection, scale: Scale, cells: list[Cell], place: Place) -> Table:
    """The table of the selected cells; the files hold all of the table's cells, whichever were selected by --only."""
    report = kind_module("report", table(selection.table).report)
    built: Table = report.build(rows(cells, place), scale)
    everything = expand(dataclasses.replace(selection, only=None), scale)
    whole: Table = report.build(rows(everything, place), scale)
    folder = place.store.results / "tables" / scale
    with store.disk_errors(place.store.root):
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("md", to_markdown(whole)), ("tex", to_latex(whole)), ("json", to_json(whole))):
            path = folder / f"{file_stem(selection)}.{suffix}"
            store.write_text(path, text)
    return built
