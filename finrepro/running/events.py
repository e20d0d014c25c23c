"""What a process that computes cells tells whoever started it: events, a line of JSON each, the
last of a cell being how it ended. A process asked to stop finishes its step first; one that nobody
listens to any more ends at once, and seals nothing.
"""

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from finrepro import strict_json
from finrepro.errors import CellFailed, EnvironmentFault, FinreproError, Interrupted
from finrepro.evidence import store
from finrepro.runtime import process

Event = dict[str, Any]
Emit = Callable[[Event], None]

INTERRUPTED = 130
EXIT_CODES = {store.DONE: 0, store.SKIPPED: EnvironmentFault.exit_code}


# The driver's process id, for the processes that it starts and for theirs. It holds the store's
# lock, which they inherit; a cell that is started by hand has none, and holds the lock itself.
DRIVER = "FINREPRO_DRIVER"


def driver() -> int | None:
    """The process that started this one on behalf of a campaign, if one did."""
    return int(os.environ[DRIVER]) if DRIVER in os.environ else None


def follow_parent() -> Callable[[], bool]:
    """Die when the parent dies, and note a request to stop (SIGTERM); whether there was one.

    A driver that was gone before the kernel was told ends this process here.
    """
    requests: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: requests.append(number))
    # The terminal sends it to the whole group; whoever started this process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.die_with_parent()
    number = driver()
    if number is not None and not process.descends_from(number):
        process.end(INTERRUPTED)
    return lambda: bool(requests)


def emitter(stream: TextIO) -> Emit:
    """Events as lines of JSON on a stream. Where its reader is gone the process ends, before
    anything can take that for a failure of its cell.
    """

    def emit(event: Event) -> None:
        try:
            stream.write(strict_json.dumps(event) + "\n")
            stream.flush()
        except BrokenPipeError:
            process.end(INTERRUPTED)

    return emit


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
