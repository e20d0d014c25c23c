"""A table from the store: cells joined with their results, given to the report, and written as Markdown, LaTeX and JSON."""

from typing import Any

from finrepro import store
from finrepro.catalogue import table
from finrepro.cells import Cell, Selection
from finrepro.render import Table, to_json, to_latex, to_markdown
from finrepro.run import Place
from finrepro.schema import kind_module
from finrepro.spec import Scale


def rows(cells: list[Cell], place: Place) -> list[dict[str, Any]]:
    """Cells joined with their results, as the report modules take them; refused combinations are left out."""
    joined = []
    for cell in cells:
        if cell.refusal:
            continue
        state, result = place.store.state(cell.spec), place.store.result(cell.spec.run_id) or {}
        reason = result.get("reason") or {store.STALE: "made by other source or packages"}.get(state, "")
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


def tabulate(selection: Selection, scale: Scale, cells: list[Cell], place: Place) -> Table:
    """Build the table from the store and write it as Markdown, LaTeX and JSON."""
    name = table(selection.table).report
    built: Table = kind_module("report", name).build(rows(cells, place), scale)
    folder = place.store.results / "tables" / scale
    with store.disk_errors(place.store.root):
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("md", to_markdown(built)), ("tex", to_latex(built)), ("json", to_json(built))):
            path = folder / f"{name}.{suffix}"
            store.write_text(path, text)
    return built
