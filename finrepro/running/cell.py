"""One cell, whatever comes of it: a sealed result. `python -m finrepro.running.cell` runs one
cell and is idempotent.
"""

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from finrepro.catalogue.compatibility import refusal
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import (
    DataFault,
    DiskFull,
    Diverged,
    EnvironmentFault,
    FinreproError,
    Interrupted,
    NotFinite,
    Unavailable,
    UsageError,
)
from finrepro.evidence import store
from finrepro.evidence.files import is_full
from finrepro.evidence.place import Place
from finrepro.evidence.result import seal_unfinished
from finrepro.running.events import EXIT_CODES, Emit, driver, emit_outcome, emitter, follow_parent
from finrepro.running.feeding import preparing_corpus
from finrepro.running.launch import parse, resolve
from finrepro.running.text import while_waiting
from finrepro.runtime import process, ranks


def run_cell(
    spec: RunSpec, place: Place, emit: Emit, stop_requested: Callable[[], bool]
) -> Mapping[str, Any]:
    """Walk one cell and seal its result; the content of result.json.

    A defect, faulty data or a divergence is sealed too, as `failed` or `diverged` with its reason,
    and a base that cannot be used as `skipped`. Raises `EnvironmentFault` (nothing is written) and
    `Interrupted` (a checkpoint is); a full disk is a fault of the environment, whoever met it.
    """
    started, trace = time.time(), None
    try:
        with preparing_corpus(spec, place) as keep_alive:
            # Only now, so that a package that is missing or broken costs the cell and has a name.
            from finrepro.running.walk import walk

            waiting = while_waiting(emit, stop_requested, keep_alive)
            return walk(spec, place, emit, stop_requested, waiting, started)
    except Unavailable as error:
        status, reason = store.SKIPPED, str(error)
    except (EnvironmentFault, Interrupted):
        raise
    except Diverged as error:
        status, reason = store.DIVERGED, str(error)
    except (DataFault, NotFinite) as error:
        status, reason = store.FAILED, str(error)
    except Exception as error:  # any defect costs one cell; its traceback goes into the result
        if is_full(error):
            root = place.store.root
            raise DiskFull(f"no space left for {root}; finished cells are kept.") from None
        first_line = str(error).splitlines()[0] if str(error) else ""
        status, reason = store.FAILED, f"{type(error).__name__}: {first_line}"
        trace = traceback.format_exc()
        # Into the log: of several ranks only the first one's is kept with the result.
        print(trace, file=sys.stderr)
    if not ranks.current().is_main:
        return {"status": status, "reason": reason}
    return seal_unfinished(spec, place.store, status, reason, started, trace)


def check_launch(spec: RunSpec) -> None:
    """Raise `UsageError` when the cell is refused, or this launch has another number of ranks
    than the cell has devices.
    """
    refused, launched = refusal(spec), ranks.current().world_size
    if refused:
        raise UsageError(f"{spec.label}: {refused}.")
    if launched != spec.world_size:
        raise UsageError(
            f"{spec.label} runs on {spec.world_size} device(s), and {launched} process(es) were "
            "started: take the command that --plan prints, or say --devices."
        )


def main(arguments: list[str] | None = None) -> int:
    """Run one cell as a process of its own: what launchers start, one a rank. Exit codes as
    everywhere.
    """
    stop_requested = follow_parent()
    rank = ranks.current()

    report = emitter(sys.stdout)
    emit: Emit = report if rank.is_main else lambda _: None

    def run() -> Mapping[str, Any]:
        message, place = parse(arguments)
        spec = resolve(message)
        check_launch(spec)
        with nullcontext() if driver() else place.store.lock(shared=True):
            if place.store.state(spec) == store.DONE:
                return {"status": store.DONE, "reason": None}
            return run_cell(spec, place, emit, stop_requested)

    def run_on_this_rank() -> Mapping[str, Any]:
        try:
            result = run()
        except FinreproError as error:
            print(f"finrepro: {error}", file=sys.stderr)
            raise
        if result["status"] != store.DONE and not rank.is_main:
            report({"event": "rank", "rank": rank.rank, "reason": result["reason"]})
        return result

    code = emit_outcome(emit, run_on_this_rank)
    if code == EXIT_CODES[store.DONE]:
        ranks.leave_process_group()
    return code


if __name__ == "__main__":
    process.quiet_environment()
    process.end(main())
