"""What a person sees: the plan, progress bars, finished cells, the table, the list of cells."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from finrepro import INSTALLED, PACKAGE, PROJECT
from finrepro.campaigns.pulse import Pulse
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import Scale
from finrepro.evidence import provenance
from finrepro.evidence.place import Place
from finrepro.evidence.store import default_root
from finrepro.planning import memory_model, time
from finrepro.planning import plan as planning
from finrepro.reporting.table import Table, to_rich
from finrepro.running.events import Event
from finrepro.running.launch import command

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

STYLES = {
    "damaged": "red",
    "done": "green",
    "stale": "yellow",
    "failed": "red",
    "diverged": "red",
    "skipped": "yellow",
    "refused": "dim",
}


def program() -> str:
    """How the command line is called here: installed, in a checkout, in the image."""
    if INSTALLED:
        return "finrepro"
    return "./run" if (PROJECT / "run").is_file() else "invoke"


def duration(seconds: float) -> str:
    """A time to the precision that an estimate has."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Display:
    """The terminal; without one (a log file, CI) the same facts, a line each, and no bars but a
    line a minute.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.bars: "Progress | None" = None
        self.tasks: "dict[str, TaskID]" = {}
        self.completed = self.total = 0
        self.pulse = Pulse(self.say)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def plan(self, steps: Sequence[planning.Step], place: Place, jobs: int) -> None:
        """How many cells run, are kept, skipped and refused, with each reason once, and about
        how long it takes.
        """
        counts = Counter[str](step.action for step in steps)
        bases = sum(step.is_base for step in steps if step.action == "run")
        seconds = sum(
            time.estimated_seconds(s.spec, place) for s in steps if s.action == "run"
        ) / max(1, jobs)
        self.total = counts["run"]
        parts = [f"{counts['run']} to run" + (f" ({bases} of them pretraining)" if bases else "")]
        parts += [f"{counts[action]} {name}" for action, name in _NAMES.items() if counts[action]]
        self.say(
            f"Plan: {', '.join(parts)}." + (f" About {duration(seconds)}." if counts["run"] else "")
        )
        reasons: dict[str, list[planning.Step]] = {}
        for step in steps:
            if step.reason:
                reasons.setdefault(f"{_DOING[step.action]}: {step.reason}", []).append(step)
        for reason, alike in reasons.items():
            more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
            self.say(f"  {alike[0].spec.label}{more} - {reason}")

    def progress(self, step: planning.Step, event: Event) -> None:
        """Move the cell's bar."""
        if not self.console.is_terminal:
            self.pulse.note(step.spec.label, event)
            return
        if self.bars is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[facts]}"),
            )
            self.bars = Progress(
                *columns, TimeRemainingColumn(), console=self.console, transient=True
            )
            self.bars.start()
        label = step.spec.label
        if label not in self.tasks:
            self.tasks[label] = self.bars.add_task(label, total=step.spec.train.max_steps, facts="")
        if event["event"] == "phase":
            self.bars.update(self.tasks[label], facts=event["phase"])
        else:
            facts = f"loss {event['loss']:.3f}  {event['tokens_per_second']:,.0f} tokens/s"
            self.bars.update(self.tasks[label], completed=event["step"], facts=facts)

    def beat(self) -> None:
        """Called every second: without a terminal, what the running cells do, once a minute."""
        if not self.console.is_terminal:
            self.pulse.beat()

    def finished(
        self, step: planning.Step, status: str, reason: str, result: dict[str, Any] | None
    ) -> None:
        """One line for a finished cell: its main score and its time, or its reason."""
        self.completed += 1
        label = step.spec.label
        self.pulse.ended(label)
        if self.bars is not None and label in self.tasks:
            self.bars.remove_task(self.tasks.pop(label))
        text = reason
        if result and status == "done":
            score = result["scores"][0] if result["scores"] else None
            quality = f"{score['metric']} {score['value']:.3f}" if score else "measured, no quality"
            text = f"{quality}, {result['ended'] - result['started']:.0f} s"
        # One call: beside running bars, a line printed in parts would lose all but the last.
        line = (
            f"[{self.completed}/{self.total}] ",
            (status, STYLES.get(status, "")),
            f" {label}: {text}",
        )
        self.console.print(Text.assemble(*line))

    def close(self) -> None:
        """Take the bars away and give the terminal its cursor back."""
        if self.bars is not None:
            self.bars.stop()

    def table(self, table: Table, folder: Path, runs: bool = True) -> None:
        """The finished table and where to find it; and the `runs` behind it, where there are
        any.
        """
        wide = Console(
            highlight=False,
            width=max(self.console.width, 160) if not self.console.is_terminal else None,
        )
        wide.print(to_rich(table, wide.width))
        if not runs:
            self.say(f"Table: {folder} (md, tex, json, svg, png).")
            return
        root = folder.parent.parent.parent
        ui = f"{program()} ui" + f" --store {root}" * (root != default_root())
        self.say(
            f"Table: {folder} (md, tex, json). Evidence: {root / 'results' / 'runs'}. MLflow: {ui}"
        )


_NAMES = {"keep": "already done", "skip": "skipped", "refuse": "refused"}
_DOING = {"run": "runs again", "keep": "kept", "skip": "skipped", "refuse": "refused"}


def list_cells(steps: Sequence[planning.Step]) -> None:
    """Every cell with its label, run id, state, and reason."""
    console = Console(highlight=False)
    table = RichTable(box=None, pad_edge=False)
    for column in ("cell", "run id", "state", "reason"):
        table.add_column(column, no_wrap=column != "reason", overflow="fold")
    for step in steps:
        state = Text(step.state, style=STYLES.get(step.state, ""))
        table.add_row(Text(step.spec.label), step.spec.run_id, state, Text(step.reason))
    if console.is_terminal:
        console.print(table)
    else:
        Console(highlight=False, width=400).print(table)


def list_launches(
    steps: Sequence[planning.Step], selection: Selection, scale: Scale, place: Place
) -> None:
    """What every cell that is not refused needs, and the command that runs it by itself,
    wherever it is pasted.
    """
    # Without the lock's name a result would not say which packages made it, and be stale at once.
    lock = provenance.lock_name()
    setting = f"FINREPRO_LOCK={shlex.quote(lock)} " if lock else ""
    for step in steps:
        if step.action == "refuse":
            continue
        spec = step.spec
        devices = f"{spec.world_size} device{'s' * (spec.world_size > 1)}"
        sharing = (
            spec.train.engine
            if spec.train.engine != "deepspeed"
            else f"ZeRO-{spec.train.zero_stage}"
        )
        gibibytes = memory_model.needed_bytes(spec) / planning.GIB
        needs = f"{devices} with {gibibytes:.2f} GiB each, {sharing}"
        print(f"\n{spec.label}: {needs}; {step.state}{f' ({step.reason})' if step.reason else ''}")
        print(
            f"  cd {shlex.quote(str(PACKAGE.parent))} && "
            f"{setting}{shlex.join(command(spec, selection, scale, place))}"
        )
