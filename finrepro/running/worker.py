"""A process that runs cells one after another with its imports done once, and the driver's handle
on it.

One crash costs one cell: the driver starts a new process and goes on. When the driver dies, the
worker dies with it.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from finrepro.evidence import provenance, store
from finrepro.evidence.place import Place
from finrepro.runtime import process as runtime

Event = dict[str, Any]


def serve() -> int:
    """Read requests from standard input until it ends; write events, a line of JSON each, to
    what was standard output.
    """
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the events
    runtime.die_with_parent()
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the terminal sends it to everybody; the driver decides
    runtime.quiet_environment()

    from finrepro.errors import FinreproError, Interrupted
    from finrepro.running.cell import run_cell
    from finrepro.running.launch import resolve

    def emit(event: Event) -> None:
        channel.write(json.dumps(event) + "\n")

    provenance.source_digest()  # now, before anybody edits a file under a running cell
    for line in sys.stdin:
        gc.collect()  # the model of the cell before, which reference cycles keep alive
        message = json.loads(line)
        place = Place(
            store.Store(Path(message["store"])),
            *(message[k] and Path(message[k]) for k in ("data_dir", "models_dir")),
        )
        try:
            result = run_cell(resolve(message["request"]), place, emit, lambda: bool(stop))
            emit({"event": "result", "status": result["status"], "reason": result["reason"]})
        except Interrupted as error:
            emit({"event": "interrupted", "reason": str(error)})
            return 130
        except FinreproError as error:
            emit({"event": "fault", "reason": str(error), "exit_code": error.exit_code})
        if stop:
            return 130
    return 0


if __name__ == "__main__":
    runtime.end(serve())
