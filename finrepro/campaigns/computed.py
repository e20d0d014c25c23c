"""Tables that are computed from the models' sizes: no cells, nothing to run, nothing to record.
They are made anew at each call.
"""

from dataclasses import fields
from typing import Any

from finrepro.campaigns.outcome import Reproduced
from finrepro.campaigns.preview import CampaignOptions, CampaignPlan
from finrepro.catalogue import reader
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import Scale
from finrepro.errors import UsageError
from finrepro.evidence.place import Place
from finrepro.kinds import computed_report_of
from finrepro.reporting.curves import draw_charts
from finrepro.reporting.files import write_table
from finrepro.reporting.table import Table
from finrepro.sizes import flops
from finrepro.sizes.account import Computed, model_account, shares

SCALE: Scale = "paper"  # real models, whatever the machine
STORED = ("none", "int8", "nf4")
POINTS = 2  # of the figure's curves, a doubling of the length


def check(selection: Selection, options: CampaignOptions) -> None:
    """Raise `UsageError` for an option that needs cells."""
    number = selection.table.removeprefix("table")
    flags = {"world_size": "devices"}
    inapplicable = [
        flags.get(field.name, field.name)
        for field in fields(Selection)
        if field.name != "table" and getattr(selection, field.name) != field.default
    ]
    inapplicable += ["jobs"] * (options.jobs is not None) + ["keep"] * options.keep
    if inapplicable:
        raise UsageError(
            f"table {number} is computed from the models' sizes and has no cells: "
            f"--{inapplicable[0]} does not apply."
        )
    if options.scale not in ("auto", SCALE):
        raise UsageError(
            f"table {number} is computed for the paper's models: "
            f"--scale {options.scale} does not apply."
        )


def plan_table(selection: Selection, place: Place, options: CampaignOptions) -> CampaignPlan:
    """A plan without cells. Raises `UsageError` as `check`."""
    check(selection, options)
    return CampaignPlan(selection, SCALE, "computed from the models' sizes", place, 1, (), ())


def reproduce(selection: Selection, place: Place, options: CampaignOptions) -> Reproduced:
    """Write the table. Raises `UsageError` as `check`."""
    check(selection, options)
    table = write(selection.table, place)
    return Reproduced(table, SCALE, place.store.results / "tables" / SCALE)


def write(name: str, place: Place) -> Table:
    """The table; its Markdown, LaTeX, JSON and figure go to the store."""
    file = reader.table(name)
    settings: Computed = file.computed  # type: ignore[assignment]
    report = computed_report_of(file.report)
    accounts = [account_of(name, settings) for name in settings.models]
    table = report.build(accounts, settings)
    figure = draw_charts(report.charts(accounts), table.title)
    path = place.store.results / "tables" / SCALE / file.report
    with place.store.lock():
        write_table(place.store.root, path, table, figure)
    return table


def account_of(name: str, settings: Computed) -> dict[str, Any]:
    """A model's account, with the points of its curve."""
    model = reader.model(name)
    stored = {form: reader.quantizer(form, model.dtype) for form in STORED}
    steps = (round(64 * 2 ** (step / POINTS)) for step in range(100))
    lengths = [length for length in steps if length <= flops.positions(model)]
    curve = {length: shares(flops.forward(model, length, causal=True)) for length in lengths}
    return model_account(model, settings, stored) | {"curve": curve}
