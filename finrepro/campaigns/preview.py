"""What a call of `reproduce` would do: the scale, the cells, and what will happen to each."""

import dataclasses
import shlex
from dataclasses import dataclass
from typing import cast

from finrepro.campaigns.display import Display, duration, list_cells, list_launches, program
from finrepro.catalogue import reader
from finrepro.catalogue.cells import expand
from finrepro.catalogue.resolve import Cell
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import Scale
from finrepro.evidence.place import Place
from finrepro.evidence.store import default_root
from finrepro.planning import plan as planning
from finrepro.planning import time


@dataclass(frozen=True)
class CampaignOptions:
    """How a campaign is run; what it consists of is the `Selection`."""

    scale: str = "auto"
    jobs: int | None = None  # as many as the machine has room for
    keep: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class CampaignPlan:
    """A table's selected cells at a scale (and `why` that one); `steps` are these and the bases
    that they need, in the order in which they run, each with its state and what will happen. A
    table that is computed from sizes has neither.
    """

    selection: Selection
    scale: Scale
    why: str
    place: Place
    jobs: int
    cells: tuple[Cell, ...]
    steps: tuple[planning.Step, ...]

    @property
    def title(self) -> str:
        """The table and the scale, in a line."""
        number = self.selection.table.removeprefix("table")
        return f"Table {number} at {self.scale} scale ({self.why})."

    def show(self, launches: bool = False) -> None:
        """Print every cell with its state, or with what it needs and the command that runs it."""
        display = Display()
        if not self.cells:
            number = self.selection.table.removeprefix("table")
            display.say(
                f"Table {number} is {self.why}: no cell runs. "
                f"{program()} reproduce --table {number} makes it, in seconds."
            )
            return
        display.say(self.title)
        if launches:
            list_launches(self.steps, self.selection, self.scale, self.place)
        else:
            list_cells(self.steps)
        display.plan(self.steps, self.place, self.jobs)


def is_computed(name: str) -> bool:
    """Whether a table is computed from sizes, and has no cells. Raises `UsageError` for an unknown
    one.
    """
    return reader.table(name).computed is not None


def choose_scale(selection: Selection, requested: str, place: Place) -> tuple[Scale, str]:
    """The scale, and why."""
    if requested == "auto":
        everything = dataclasses.replace(selection, quick=False, full=False, only=None)
        scales = reader.scales(selection.table) if selection.adapter else ()
        fitting = [
            scale for scale in scales if any(not cell.refusal for cell in expand(everything, scale))
        ]
        if len(fitting) == 1:
            return fitting[0], "the base of the adapter is there"
        return planning.auto_scale(lambda: expand(everything, "paper"), place)
    return cast("Scale", requested), "asked for"


def plan_campaign(
    selection: Selection, place: Place, options: CampaignOptions, ask_hub: bool = False
) -> CampaignPlan:
    """The plan of a campaign; nothing runs, nothing is printed. With `ask_hub`, weights of real
    models may still be fetched. Raises `UsageError` for a wrong request.
    """
    scale, why = choose_scale(selection, options.scale, place)
    cells = tuple(expand(selection, scale))
    steps = planning.plan_steps(list(cells), place, options.keep, ask_hub and scale == "paper")
    jobs = options.jobs or planning.default_jobs(steps)
    return CampaignPlan(selection, scale, why, place, jobs, cells, tuple(steps))


def next_step(plan: CampaignPlan) -> str:
    """The line after a table of miniatures: the command that makes the same one with a real
    language model, and its estimated time. Empty where nothing of that is left to run here.
    """
    selection, place = plan.selection, plan.place
    if plan.scale != "smoke" or "open" not in reader.scales(selection.table) or selection.adapter:
        return ""
    times = {}
    for name, quick in (("--quick", True), ("the whole", False)):
        cells = expand(Selection(selection.table, quick=quick), "open")
        steps = planning.plan_steps(cells, place, keep=True)
        waiting = [step for step in steps if step.action == "run"]
        seconds = sum(time.estimated_seconds(step.spec, place) for step in waiting)
        if waiting:
            times[name] = f"{name} about {duration(seconds / planning.default_jobs(steps))}"
    if not times:
        return ""
    words = [program(), "reproduce", "--table", selection.table, "--scale", "open"]
    root = place.store.root
    words += ["--store", str(root)] * (root != default_root())
    words += ["--data-dir", str(place.data_dir)] * (place.data_dir is not None)
    return f"Next, a real language model: {shlex.join(words)} ({', '.join(times.values())})."
