"""A table from the store: cells joined with their results, reported, and written to files."""

import dataclasses

from finrepro.catalogue.cells import expand
from finrepro.catalogue.reader import published, table
from finrepro.catalogue.resolve import Cell, foreign_adapter
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import Scale
from finrepro.evidence.place import Place
from finrepro.kinds import report_of
from finrepro.reporting.curves import draw_charts
from finrepro.reporting.dots import draw
from finrepro.reporting.files import write_table
from finrepro.reporting.rows import with_neighbours
from finrepro.reporting.table import Table


def file_stem(selection: Selection) -> str:
    """The name of the table's files. A selection of other cells than the table's default ones has
    files of its own.
    """
    parts = [table(selection.table).report]
    parts += [name for name in ("quick", "full") if getattr(selection, name)]
    if selection.adapter:  # many folders are called checkpoint-500
        adapter = foreign_adapter(selection.adapter)
        parts.append(f"{adapter.name}_{adapter.config.sha256[:6]}")
    parts += [f"seeds{'_'.join(map(str, selection.seeds))}"] if selection.seeds else []
    parts += [f"{selection.world_size}_devices"] if selection.world_size else []
    return "-".join(parts + (["random_weights"] if selection.weights == "random" else []))


def tabulate(selection: Selection, scale: Scale, cells: list[Cell], place: Place) -> Table:
    """The table of the selected cells. The files and the figure hold the cells that --only leaves
    out as well.
    """
    report = report_of(table(selection.table).report)
    values = published() if scale == "paper" else ()
    all_cells = (
        cells
        if selection.only is None
        else expand(dataclasses.replace(selection, only=None), scale)
    )
    rows = with_neighbours(selection, scale, all_cells, place)
    full_table = report.build(rows, scale, values)
    figure = None
    if panels := report.panels(rows):
        figure = draw(panels, full_table.title)
    if charts := report.charts(rows):
        figure = draw_charts(charts, full_table.title, columns=2)
    path = place.store.results / "tables" / scale / file_stem(selection)
    write_table(place.store.root, path, full_table, figure)
    if all_cells is cells:
        return full_table
    selected_rows = with_neighbours(selection, scale, cells, place)
    return report.build(selected_rows, scale, values)
