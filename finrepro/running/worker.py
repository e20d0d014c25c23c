"""A process that runs cells one after another with its imports done once.

One crash costs one cell: the driver (finrepro.campaigns.local) starts a new process and goes on.
When the driver dies, the worker dies with it.
"""

import gc
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from finrepro import strict_json
from finrepro.evidence import provenance, store
from finrepro.evidence.place import Place
from finrepro.running.events import INTERRUPTED, emit_outcome, emitter, follow_parent
from finrepro.runtime import process


def serve() -> int:
    """Read requests from standard input until it ends; write events, a line of JSON each, to
    what was standard output.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the events
    stop_requested = follow_parent()
    process.quiet_environment()

    from finrepro.running.cell import run_cell
    from finrepro.running.launch import resolve

    emit = emitter(channel)

    def run(message: dict[str, Any]) -> Mapping[str, Any]:
        folders = (message[key] and Path(message[key]) for key in ("data_dir", "models_dir"))
        place = Place(store.Store(Path(message["store"])), *folders)
        return run_cell(resolve(message["request"]), place, emit, stop_requested)

    provenance.source_digest()  # now, before anybody edits a file under a running cell
    for line in sys.stdin:
        gc.collect()  # the model of the cell before, which reference cycles keep alive
        code = emit_outcome(emit, partial(run, strict_json.loads(line)))
        if code == INTERRUPTED or stop_requested():
            return INTERRUPTED
    return 0


if __name__ == "__main__":
    process.end(serve())
