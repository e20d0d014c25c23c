"""A table from command to numbers: plan the cells, run what is missing, record each, render the
table.
"""

import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import NoReturn

from finrepro.campaigns.display import Display
from finrepro.campaigns.local import Worker
from finrepro.campaigns.log import CampaignLog
from finrepro.campaigns.outcome import Reproduced
from finrepro.campaigns.preview import CampaignOptions, CampaignPlan, next_step, plan_campaign
from finrepro.catalogue.selection import Selection
from finrepro.errors import EnvironmentFault, UsageError
from finrepro.evidence import store
from finrepro.evidence.place import Place
from finrepro.evidence.result import seal_unfinished
from finrepro.planning import machine
from finrepro.planning import plan as planning
from finrepro.reporting.tabulate import tabulate
from finrepro.running.events import Event


def reproduce(selection: Selection, place: Place, options: CampaignOptions) -> Reproduced:
    """Run a table's missing cells, record each, and write the table.

    A cell that fails, or cannot run here, is a state and no error. Raises `UsageError` for a wrong
    request, `EnvironmentFault` where the store is in use or full, `KeyboardInterrupt` when it is
    stopped; what is finished by then is kept.
    """
    display = Display(options.quiet)
    plan = plan_campaign(selection, place, options, ask_hub=True)
    display.say(plan.title)
    if all(cell.refusal for cell in plan.cells):
        raise UsageError(f"{plan.cells[0].label}: {plan.cells[0].refusal}.")
    steps = list(plan.steps)
    planning.check_jobs(plan.jobs, steps)
    planning.check_packages(steps, place)
    display.plan(steps, place, plan.jobs)
    with _interruptible() as interrupts, place.store.lock() as lock:
        campaign = _Campaign(plan, options, display, lock, interrupts)
        whole = False
        try:
            campaign.run()
            whole = True
        finally:
            display.close()
            place.store.check_lock(lock)
            try:
                table = tabulate(selection, plan.scale, list(plan.cells), place)
            finally:
                campaign.log.close(whole)
    return Reproduced(
        table,
        plan.scale,
        place.store.results / "tables" / plan.scale,
        {
            cell.label: campaign.unfinished.get(cell.spec.run_id) or place.store.state(cell.spec)
            for cell in plan.cells
            if not cell.refusal
        },
        tuple(campaign.log.faults),
        next_step(plan),
    )


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM (`docker stop`, a batch system's time limit) raise
    `KeyboardInterrupt`, and are noted in the list: an exception that is raised inside a callback of
    a library is lost. As process 1 of a container we would not even die of SIGTERM otherwise. Only
    a main thread can do so.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        noted.append(number)
        raise KeyboardInterrupt

    handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's job in the background
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Campaign:
    """One call of `reproduce`: jobs run cells in threads that only pass on events; this thread
    shows and records them.
    """

    def __init__(
        self,
        plan: CampaignPlan,
        options: CampaignOptions,
        display: Display,
        lock: int,
        interrupts: list[int],
    ) -> None:
        self.plan, self.place, self.display = plan, plan.place, display
        self.lock, self.interrupts = lock, interrupts
        self.log = CampaignLog(plan, options)
        self.events: queue.Queue[tuple[planning.Step, Event]] = queue.Queue()
        # Run id -> how it ended now: the store shows an older result that is finished.
        self.unfinished: dict[str, str] = {}

    def run(self) -> None:
        """Record skipped cells, then run bases, then the cells on them."""
        for step in self.plan.steps:
            if step.action == "skip":
                self._skip(step)
            elif step.action == "keep":
                self.log.note_finished(step)
        waiting = [step for step in self.plan.steps if step.action == "run"]
        if not waiting:
            return
        self.log.save()
        workers = [
            Worker(
                self.place,
                self.plan.selection,
                self.plan.scale,
                self.place.store.results / "logs" / f"worker{number}.log",
                card,
                self.lock,
            )
            for number, card in enumerate(machine.cards(min(self.plan.jobs, len(waiting))))
        ]
        for worker in workers:
            worker.log.write_text("")
            if any(step.spec.world_size == 1 for step in waiting):
                worker.start()  # by this thread: a worker dies with the thread that started it
        try:
            self._jobs(workers, waiting)
        except (KeyboardInterrupt, EnvironmentFault) as error:
            if isinstance(error, KeyboardInterrupt):
                self.interrupts.clear()
                self.display.say(
                    "Stopping: the running cell saves its state. "
                    "Run the same command again to go on."
                )
            for worker in workers:
                worker.interrupt()
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
        unfinished = len(waiting)
        while unfinished:
            step, event = self._next_event()
            if event["event"] in ("step", "phase"):
                self.display.progress(step, event)
            else:
                self._finished(step, event)
                unfinished -= 1
        self._check()

    def _next_event(self) -> tuple[planning.Step, Event]:
        """What a job reports next; looks about every second while it waits."""
        while True:
            self._check()
            self.display.beat()
            with suppress(queue.Empty):
                return self.events.get(timeout=1.0)

    def _check(self) -> None:
        """Raise for an interrupt that a library has swallowed, and for a store that is gone."""
        if self.interrupts:
            raise KeyboardInterrupt
        self.place.store.check_lock(self.lock)

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
                    end = "was skipped" if state == store.SKIPPED else "failed"
                    reason = f"its base {step.base.label} {end}"
                    self._pass_on(step, {"event": "died", "status": status, "reason": reason})
                    continue
            self._pass_on(step, {"event": "phase", "phase": "start"})
            try:
                event = worker.run(step.spec, partial(self._pass_on, step))
            except Exception as error:  # of this thread: the others must not wait for it for ever
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
        if status != store.DONE:
            self.unfinished[step.spec.run_id] = status
        if status == store.SKIPPED:  # found out only when its base was opened
            self.log.note(step, "skipped", status)
            return
        self.log.note(step, "ran", status)
        self.log.show(step)

    def _skip(self, step: planning.Step) -> None:
        """Record a skipped cell, unless the same is on record. It is no run: MLflow shows it in
        the campaign's table alone.
        """
        before = self.place.store.result(step.spec.run_id)
        if before is None or before["status"] != store.SKIPPED or before["reason"] != step.reason:
            seal_unfinished(step.spec, self.place.store, store.SKIPPED, step.reason, time.time())
            self.log.note(step, "skipped", store.SKIPPED)
        else:
            self.log.note(step, "kept", store.SKIPPED)
