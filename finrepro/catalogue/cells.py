"""From a table to its cells: the axes crossed, the selection applied, and what cannot be
combined named with its reason.
"""

import difflib

from finrepro.catalogue.grid import GridPoint, checked_grid, grid_points
from finrepro.catalogue.resolve import Cell, group_of, matches, resolve_cells
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import Scale
from finrepro.catalogue.table_file import Grid
from finrepro.errors import UsageError


def expand(selection: Selection, scale: Scale) -> list[Cell]:
    """Every selected cell of the table at `scale`, in the order of the axes. Raises `UsageError`
    if none is left.
    """
    grid = checked_grid(selection.table, scale)
    points = grid_points(selection, scale)
    only = ("*" if selection.only is None else selection.only,)
    matching = [point for point in points if matches(only, point.label)]
    selected = [point for point in matching if _runs(grid, selection, point)]
    if not selected:
        raise _no_match(selection, [point.label for point in points])
    cells = resolve_cells(grid, selection, selected)
    runnable = [cell for cell in cells if not cell.refusal]
    # An adapter from elsewhere stands on its own base alone: other models' cells are not listed.
    return runnable if selection.adapter and runnable else cells


def _runs(grid: Grid, selection: Selection, point: GridPoint) -> bool:
    """Whether the selection runs the point: a group has it, at this seed."""
    group = group_of(grid, selection, point.label)
    return group is not None and (
        selection.seeds is not None or not group.seeds or point.seed in group.seeds
    )


def _no_match(selection: Selection, labels: list[str]) -> UsageError:
    """Why nothing is selected, with the nearest label."""
    near = difflib.get_close_matches(selection.only or "", labels, n=1, cutoff=0.3)
    hint = f" Nearest: {near[0]}." if near else ""
    if selection.only is None:
        return UsageError(
            f"no cell of table {selection.table} is left with --quick and these seeds."
        )
    if not (selection.full or selection.quick) and any(
        matches((selection.only,), label) for label in labels
    ):
        return UsageError(
            f"the cells of table {selection.table} that match --only '{selection.only}' "
            "are not among its default ones: add --full."
        )
    return UsageError(
        f"no cell of table {selection.table} matches --only '{selection.only}'"
        f"{' with --quick' if selection.quick else ''}.{hint} The pattern is a label with * and ?; "
        "list the labels with: invoke cells"
    )
