"""The plan: what happens to each cell - kept, run, skipped or refused - and why, before any run."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from finrepro.catalogue.reader import origin
from finrepro.catalogue.resolve import Cell
from finrepro.catalogue.spec import RunSpec, Scale
from finrepro.errors import EnvironmentFault, UsageError
from finrepro.evidence import store
from finrepro.evidence.place import Place
from finrepro.models import packaged
from finrepro.planning import availability
from finrepro.planning.machine import local_machine
from finrepro.planning.memory_model import needed_bytes

Action = Literal["run", "keep", "skip", "refuse"]
GIB = 2**30
PROCESS_BYTES = GIB  # of a process that runs cells, before it has a model


@dataclass(frozen=True)
class Step:
    """A run and its action. `reason` says why it is skipped, refused or run again."""

    spec: RunSpec
    action: Action
    state: str
    reason: str = ""
    is_base: bool = False
    base: RunSpec | None = None


def default_jobs(steps: Sequence[Step]) -> int:
    """How many cells to run at a time where nobody said: as many as the cores of this machine (one
    `spec.threads` wide) and four fifths of its memory hold; one on a GPU, and one where costs
    are the table's matter, or time, as of pretraining: cells side by side slow each other down.
    """
    waiting = [step for step in steps if step.action == "run"]
    running = [step.spec for step in waiting]
    costs = any(
        not step.spec.tasks or step.spec.weights == "scratch"
        for step in waiting
        if not step.is_base
    )
    machine = local_machine()
    if not running or machine.gpus or costs:
        return 1
    cores = machine.cores // max(spec.threads for spec in running)
    memory = max(needed_bytes(spec) * spec.world_size for spec in running) + PROCESS_BYTES
    return max(1, min(cores, int(0.8 * machine.memory_bytes / memory), len(running)))


def check_jobs(jobs: int, steps: list[Step]) -> None:
    """Raise `UsageError` where jobs would share a GPU: each needs one of its own."""
    cards = local_machine().gpus
    widest = max((step.spec.world_size for step in steps if step.action == "run"), default=1)
    if cards and jobs > 1 and (jobs > cards or widest > 1):
        reason = (
            f"this machine has {cards} GPU(s)"
            if jobs > cards
            else f"one of the cells takes {widest}"
        )
        raise UsageError(f"--jobs {jobs}: every job needs a GPU of its own, and {reason}.")


def check_packages(steps: list[Step], place: Place) -> None:
    """Raise `EnvironmentFault` where nothing is left to show or to run because a package of weights
    is missing: it belongs to the installation, as torch does.
    """
    skipped = [step for step in steps if step.action != "refuse"]
    reasons = [
        packaged.missing_reason(origin(step.spec.model), place.store.cache)
        for step in skipped
        if step.action == "skip" and packaged.is_source(step.spec)
    ]
    if reasons and len(reasons) == len(skipped) and None not in reasons:
        raise EnvironmentFault(str(reasons[0]))


def cannot_run(spec: RunSpec, place: Place, ask_hub: bool = False) -> str | None:
    """Why this machine cannot run the cell, in one line; None if it can. With `ask_hub`, weights
    may still be downloaded.
    """
    devices = local_machine().gpus or len(os.sched_getaffinity(0))
    if spec.world_size > devices:
        return f"needs {spec.world_size} devices, this machine has {devices}"
    reason = availability.missing_data(spec, place)
    if reason:
        return reason
    if spec.model.scale == "smoke":
        return None
    machine = local_machine()
    if machine.gpu_bytes:
        required, available = needed_bytes(spec), machine.gpu_bytes
        owner = f"its {machine.gpu_name}"
    else:  # ranks on a host share its memory
        required, available = needed_bytes(spec) * spec.world_size, machine.memory_bytes
        owner = "this machine"
    if required > available:
        return f"needs {required / GIB:.1f} GiB, {owner} has {available / GIB:.1f}"
    return availability.missing_base(spec, place, ask_hub) if spec.weights == "pretrained" else None


def plan_steps(cells: list[Cell], place: Place, keep: bool, ask_hub: bool = False) -> list[Step]:
    """The steps in the order in which they run: bases before the cells that start from them. With
    `keep`, stale results are kept.
    """
    steps = [_step(cell.spec, place, keep, ask_hub, cell.refusal, cell.base) for cell in cells]
    bases = {
        step.base.run_id: step.base
        for step in steps
        if step.action == "run" and step.base is not None
    }
    base_steps = [
        _step(base, place, keep, ask_hub, None, None, is_base=True) for base in bases.values()
    ]
    return base_steps + steps


def _step(
    spec: RunSpec,
    place: Place,
    keep: bool,
    ask_hub: bool,
    refusal: str | None,
    base: RunSpec | None,
    is_base: bool = False,
) -> Step:
    if refusal:
        return Step(spec, "refuse", "refused", refusal, is_base, base)
    # The weights of a base are read by what starts from it.
    found = place.store.found(spec.run_id, weights=is_base)
    state, damage = found.state, f"it is damaged: {', '.join(found.faults)}"
    if state == store.DONE or (state == store.STALE and keep):
        return Step(
            spec,
            "keep",
            state,
            "made by other source or packages" if state == store.STALE else "",
            is_base,
            base,
        )
    reason = cannot_run(spec, place, ask_hub)
    if (
        reason and state == store.STALE
    ):  # evidence that cannot be made again here is not thrown away
        return Step(
            spec,
            "keep",
            state,
            f"made by other source or packages, and cannot be made again: {reason}",
            is_base,
            base,
        )
    if reason and state == store.DAMAGED:
        return Step(spec, "keep", state, f"{damage}; cannot be made again: {reason}", is_base, base)
    if reason:
        return Step(spec, "skip", store.SKIPPED, reason, is_base, base)
    again = {
        store.STALE: "its source or packages have changed",
        store.MISSING: "",
        store.DAMAGED: damage,
    }
    return Step(spec, "run", state, again.get(state, f"it {state} before"), is_base, base)


def auto_scale(paper: Callable[[], list[Cell]], place: Place) -> tuple[Scale, str]:
    """`paper` where a GPU is there and at least one of the table's cells can run on it, else
    `smoke`; and why.
    """
    machine = local_machine()
    if not machine.gpu_bytes:
        return "smoke", "no CUDA device on this machine"
    specs = [cell.spec for cell in paper() if not cell.refusal]
    # Days of pretraining on a corpus that has to be prepared first only start at --scale paper.
    reasons = [
        availability.unfinished_corpus(spec, place) or cannot_run(spec, place, ask_hub=True)
        for spec in specs
    ]
    if None in reasons:
        return "paper", f"{machine.gpu_name} found, and at least one cell can run on it"
    reason = reasons[0] if reasons else "all are refused"
    return "smoke", f"{machine.gpu_name} found, but no cell can run: {reason}"
