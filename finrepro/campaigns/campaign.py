"""A table from command to numbers: plan the cells, run what is missing, record each, render the
table.
"""

import dataclasses
import queue
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from finrepro.campaigns.display import Display, list_cells, list_launches
from finrepro.campaigns.local import Worker
from finrepro.catalogue.cells import expand
from finrepro.catalogue.resolve import Cell
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import Scale
from finrepro.errors import CellFailed, EnvironmentFault, UsageError
from finrepro.evidence import files, provenance, store
from finrepro.evidence.place import Place
from finrepro.evidence.result import seal_unfinished
from finrepro.planning import machine
from finrepro.planning import plan as planning
from finrepro.reporting.tabulate import file_stem, tabulate
from finrepro.running.worker import Event
from finrepro.runtime.interrupts import held_back
from finrepro.tracking.index import is_shown
from finrepro.tracking.view import MlflowView


@dataclass(frozen=True)
class Options:
    """How a campaign is run; what it consists of is the `Selection`."""

    scale: str = "auto"
    jobs: int = 1
    keep: bool = False


def choose_scale(selection: Selection, wanted: str, place: Place) -> tuple[Scale, str]:
    """The scale, and why."""
    if wanted == "auto":
        whole = dataclasses.replace(selection, quick=False, full=False, only=None)
        scales: tuple[Scale, ...] = ("smoke", "paper") if selection.adapter else ()
        fitting = [
            scale for scale in scales if any(not cell.refusal for cell in expand(whole, scale))
        ]
        if len(fitting) == 1:
            return fitting[0], "the base of the adapter is there"
        return planning.auto_scale(lambda: expand(whole, "paper"), place)
    return ("paper" if wanted == "paper" else "smoke"), "asked for"


def list_plan(selection: Selection, place: Place, options: Options, launches: bool = False) -> int:
    """Print the selected cells with their states, or with what each needs and the command that
    runs it. Nothing runs.
    """
    scale, why = choose_scale(selection, options.scale, place)
    steps = planning.plan(expand(selection, scale), place, options.keep)
    display = Display()
    display.say(f"Table {selection.table} at {scale} scale ({why}).")
    if launches:
        list_launches(steps, selection, scale, place)
    else:
        list_cells(steps)
    display.plan(steps, place, options.jobs)
    return 0


def reproduce(selection: Selection, place: Place, options: Options) -> int:
    """Run a table's missing cells and print it; the exit code (see finrepro.errors)."""
    display = Display()
    scale, why = choose_scale(selection, options.scale, place)
    cells = expand(
        selection, scale
    )  # before anything is printed: a wrong request is answered in one line
    display.say(f"Table {selection.table.removeprefix('table')} at {scale} scale ({why}).")
    if all(cell.refusal for cell in cells):
        raise UsageError(f"{cells[0].label}: {cells[0].refusal}.")
    steps = planning.plan(cells, place, options.keep, ask_hub=scale == "paper")
    planning.check_jobs(options.jobs, steps)
    display.plan(steps, place, options.jobs)
    # `docker stop`, a batch system's time limit: as Ctrl-C. As process 1 of a container we would
    # not even die of it otherwise.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with place.store.lock():
        campaign = _Campaign(selection, scale, place, options, steps, display)
        try:
            campaign.run()
        finally:
            display.close()
            rendered = tabulate(selection, scale, cells, place)
            campaign.finish()
    display.table(rendered, place.store.results / "tables" / scale)
    return campaign.exit_code(cells)


class _Campaign:
    """One call of `reproduce`: jobs run cells in threads that only pass on events; this thread
    shows and records them.
    """

    def __init__(
        self,
        selection: Selection,
        scale: Scale,
        place: Place,
        options: Options,
        steps: list[planning.Step],
        display: Display,
    ) -> None:
        self.selection, self.scale, self.place, self.display = selection, scale, place, display
        self.steps, self.jobs = steps, max(1, options.jobs)
        self.events: queue.Queue[tuple[planning.Step, Event]] = queue.Queue()
        self.view: Any = None
        self.parent = ""
        started = time.time()
        self.record: dict[str, Any] = {
            "id": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(started))
            + f"-{provenance.source_digest()[:6]}",
            "table": f"table{selection.table.removeprefix('table')}",
            "scale": scale,
            "status": "running",
            "command": shlex.join(sys.argv[1:]),
            "started": started,
            "ended": started,
            "cells": [],
            "rendered": file_stem(selection),
            "environment": provenance.environment(),
        }

    def run(self) -> None:
        """Record skipped cells, then run bases, then the cells on them."""
        for step in self.steps:
            if step.action == "skip":
                self._skip(step)
            elif step.action == "keep":
                shown = is_shown(self.place.store, step.spec.run_id, self.record["table"])
                self._note(step, "kept" if shown else "found", step.state)
                if not shown:  # finished by a campaign that was cut off before it could record it
                    self._project(step)
        waiting = [step for step in self.steps if step.action == "run"]
        if not waiting:
            return
        self._save()
        workers = [
            Worker(
                self.place,
                self.selection,
                self.scale,
                self.place.store.results / "logs" / f"worker{number}.log",
                card,
            )
            for number, card in enumerate(machine.cards(min(self.jobs, len(waiting))))
        ]
        for worker in workers:
            worker.log.write_text("")
            if any(step.spec.world_size == 1 for step in waiting):
                worker.start()  # by this thread: a worker dies with the thread that started it
        try:
            self._jobs(workers, waiting)
        except (KeyboardInterrupt, EnvironmentFault) as error:
            if isinstance(error, KeyboardInterrupt):
                self.display.say(
                    "Stopping: the running cell saves its state. Run the same command again to go on."
                )
            for worker in workers:
                worker.interrupt()
            self.record["status"] = "interrupted"
            raise
        finally:
            for worker in workers:
                worker.close()

    def _jobs(self, workers: list[Worker], waiting: list[planning.Step]) -> None:
        """Let every worker take cells from one queue, bases first, while this thread shows and
        records what they report.
        """
        todo: queue.Queue[planning.Step] = queue.Queue()
        for step in waiting:
            todo.put(step)
        ready = {step.spec.run_id: threading.Event() for step in waiting if step.is_base}
        for worker in workers:
            threading.Thread(target=self._work, args=(worker, todo, ready), daemon=True).start()
        left = len(waiting)
        while left:
            step, event = self.events.get()
            if event["event"] in ("step", "phase"):
                self.display.progress(step, event)
            else:
                self._finished(step, event)
                left -= 1

    def _work(
        self, worker: Worker, todo: "queue.Queue[planning.Step]", ready: dict[str, threading.Event]
    ) -> None:
        """A job: run waiting cells until none is left. A cell waits for its base, and fails with
        it.
        """
        while True:
            try:
                step = todo.get_nowait()
            except queue.Empty:
                return
            if step.base is not None:
                if step.base.run_id in ready:
                    ready[step.base.run_id].wait()
                state = self.place.store.state(step.base)
                if state not in (store.DONE, store.STALE):
                    status = store.SKIPPED if state == store.SKIPPED else store.FAILED
                    reason = f"its base {step.base.label} {'was skipped' if state == store.SKIPPED else 'failed'}"
                    self._pass_on(step, {"event": "died", "status": status, "reason": reason})
                    continue
            self._pass_on(step, {"event": "phase", "phase": "start"})
            try:
                event = worker.run(step.spec, partial(self._pass_on, step))
            except (
                Exception
            ) as error:  # of this thread, which must not leave the others waiting for it
                event = {"event": "died", "reason": f"it could not be started: {error}"}
            if step.is_base:
                ready[step.spec.run_id].set()
            self._pass_on(step, event)

    def _pass_on(self, step: planning.Step, event: Event) -> None:
        """Hand an event of a running cell to the thread that shows it."""
        self.events.put((step, event))

    def _finished(self, step: planning.Step, event: Event) -> None:
        """Record the end of a cell, whatever it was. A fault of the environment ends the
        campaign.
        """
        if event["event"] == "fault" and event["exit_code"] == EnvironmentFault.exit_code:
            raise EnvironmentFault(event["reason"])
        if event["event"] == "interrupted":
            raise KeyboardInterrupt
        status, reason = event.get("status", store.FAILED), event.get("reason") or ""
        if event["event"] in ("died", "fault"):
            seal_unfinished(step.spec, self.place.store, status, reason, time.time())
        self.display.finished(step, status, reason, self.place.store.result(step.spec.run_id))
        if status == store.SKIPPED:  # found out only when its base was opened
            self._note(step, "skipped", status)
            return
        self._note(step, "ran", status)
        self._project(step)

    def _skip(self, step: planning.Step) -> None:
        """Record a skipped cell, unless the same is on record. It is no run: MLflow shows it in
        the campaign's table alone.
        """
        before = self.place.store.result(step.spec.run_id)
        if before is None or before["status"] != store.SKIPPED or before["reason"] != step.reason:
            seal_unfinished(step.spec, self.place.store, store.SKIPPED, step.reason, time.time())
            self._note(step, "skipped", store.SKIPPED)
        else:
            self._note(step, "kept", store.SKIPPED)

    def _note(self, step: planning.Step, outcome: str, status: str) -> None:
        self.record["cells"].append(
            {
                "label": step.spec.label,
                "run_id": step.spec.run_id,
                "outcome": outcome,
                "status": status,
            }
        )

    def _save(self) -> None:
        with files.disk_errors(self.place.store.root):
            files.write_json(
                self.place.store.results / "campaigns" / f"{self.record['id']}.json", self.record
            )

    def _project(self, step: planning.Step) -> None:
        """Show a finished cell in MLflow."""
        self._save()
        if self.view is None:
            with held_back():  # half a database is none
                self.view = MlflowView(self.place.store)
                self.parent = self.view.campaign(self.record)
        self.view.cell(step.spec.run_id, self.record, self.parent)

    def finish(self) -> None:
        """Close the campaign, if it did anything."""
        if (
            all(cell["outcome"] == "kept" for cell in self.record["cells"])
            and self.record["status"] == "running"
        ):
            return
        failed = any(
            cell["status"] in (store.FAILED, store.DIVERGED) for cell in self.record["cells"]
        )
        if self.record["status"] == "running":
            self.record["status"] = "with failed cells" if failed else "finished"
        self.record["ended"] = time.time()
        self._save()
        if self.view is not None:
            self.view.campaign(self.record)

    def exit_code(self, cells: list[Cell]) -> int:
        """0; 4 if a cell failed; 3 if the only cell asked for was skipped."""
        states = [self.place.store.state(cell.spec) for cell in cells if not cell.refusal]
        if any(state in (store.FAILED, store.DIVERGED) for state in states):
            return CellFailed.exit_code
        return EnvironmentFault.exit_code if states == [store.SKIPPED] else 0
