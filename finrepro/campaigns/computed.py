"""Tables that are computed from the models' sizes: no cells, nothing to run, nothing to record.
They are made anew at each call.
"""

from dataclasses import fields
from typing import Any

from finrepro.campaigns.display import Display
from finrepro.catalogue import reader
from finrepro.catalogue.selection import Selection
from finrepro.errors import UsageError
from finrepro.evidence.place import Place
from finrepro.kinds import computed_report_of
from finrepro.reporting.curves import draw_charts
from finrepro.reporting.files import write_table
from finrepro.reporting.table import Table
from finrepro.sizes import flops
from finrepro.sizes.account import Computed, account, shares

SCALE = "paper"  # real models, whatever the machine
STORED = ("none", "int8", "nf4")
POINTS = 2  # of the figure's curves, a doubling of the length


def is_computed(name: str) -> bool:
    """Whether a table is one of these. Raises `UsageError` for an unknown one."""
    return reader.table(name).computed is not None


def reproduce(
    selection: Selection, place: Place, scale: str = "auto", plan: bool = False, **asked: bool
) -> int:
    """Write the table and print it, or with `plan` say that there is nothing to plan; the exit
    code.

    `asked` are further options of the command, by name and whether they were given. Raises
    `UsageError` for one that needs cells.
    """
    number = selection.table.removeprefix("table")
    given = [
        each.name
        for each in fields(Selection)
        if getattr(selection, each.name) != each.default and each.name != "table"
    ]
    names = {"world_size": "devices"}
    wrong = [
        names.get(name, name)
        for name in (*given, *(name for name, value in asked.items() if value))
    ]
    if wrong:
        raise UsageError(
            f"table {number} is computed from the models' sizes and has no cells: --{wrong[0]} does not apply."
        )
    if scale == "smoke":
        raise UsageError(
            f"table {number} is computed for the real models: --scale smoke does not apply."
        )
    display = Display()
    if plan:
        display.say(
            f"Table {number} is computed from the models' sizes: no cell runs. ./run reproduce --table {number} makes it, in seconds."
        )
        return 0
    made = write(number, place)
    display.table(made, place.store.results / "tables" / SCALE, runs=False)
    return 0


def write(name: str, place: Place) -> Table:
    """The table; its Markdown, LaTeX, JSON and figure go to the store."""
    file = reader.table(name)
    settings: Computed = file.computed  # type: ignore[assignment]
    report = computed_report_of(file.report)
    accounts = [_account(each, settings) for each in settings.models]
    made = report.build(accounts, settings)
    figure = draw_charts(report.charts(accounts), made.title)
    path = place.store.results / "tables" / SCALE / file.report
    with place.store.lock():
        write_table(place.store.root, path, made, figure)
    return made


def _account(name: str, settings: Computed) -> dict[str, Any]:
    """A model's account, with the points of its curve."""
    model = reader.model(name)
    stored = {each: reader.quantizer(each, model.dtype) for each in STORED}
    steps = (round(64 * 2 ** (step / POINTS)) for step in range(100))
    lengths = [length for length in steps if length <= flops.positions(model)]
    curve = {length: shares(flops.forward(model, length, causal=True)) for length in lengths}
    return account(model, settings, stored) | {"curve": curve}
