"""What a process that computes cells tells whoever started it: events, a line of JSON each, the
last of a cell being how it ended. A process asked to stop finishes its step first.
"""

import signal
from collections.abc import Callable, Mapping
from typing import Any

from finrepro.errors import CellFailed, EnvironmentFault, FinreproError, Interrupted
from finrepro.evidence import store
from finrepro.runtime import process

Event = dict[str, Any]
Emit = Callable[[Event], None]

INTERRUPTED = 130
EXIT_CODES = {store.DONE: 0, store.SKIPPED: EnvironmentFault.exit_code}


def follow_parent() -> Callable[[], bool]:
    """Die when the parent dies, and note a request to stop (SIGTERM); whether there was one."""
    requests: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: requests.append(number))
    # The terminal sends it to the whole group; whoever started this process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.die_with_parent()
    return lambda: bool(requests)


def emit_phase(emit: Emit, phase: str) -> None:
    """Say what is done from now on."""
    emit({"event": "phase", "phase": phase})


def emit_outcome(emit: Emit, run: Callable[[], Mapping[str, Any]]) -> int:
    """Run one cell and emit how it ended, as one event; the exit code that stands for it."""
    try:
        result = run()
    except Interrupted as error:
        emit({"event": "interrupted", "reason": str(error)})
        return INTERRUPTED
    except FinreproError as error:
        emit({"event": "fault", "reason": str(error), "exit_code": error.exit_code})
        return error.exit_code
    emit({"event": "result", "status": result["status"], "reason": result["reason"]})
    return EXIT_CODES.get(result["status"], CellFailed.exit_code)
