"""A driver that is killed when the processes that it started have just begun: `python
driver_program.py STORE LABEL DEVICES`. Stops these, prints the id of each, and kills itself."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from finrepro.campaigns.local import Worker
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.evidence.place import Place
from finrepro.evidence.store import open_store


def begun(worker: Worker) -> list[int]:
    """The worker; or of a cell on several devices every rank."""
    if worker.process is not None:
        return [worker.process.pid]
    if worker.launched is None:
        return []
    return [rank.pid for rank in psutil.Process(worker.launched.pid).children()]


def main() -> None:
    store, label, devices = open_store(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
    selection = Selection("3", only=label, weights="random", world_size=devices)
    (cell,) = expand(selection, "smoke")
    with store.lock() as lock:
        worker = Worker(Place(store), selection, "smoke", store.results / "logs" / "log", lock=lock)
        threading.Thread(target=worker.run, args=(cell.spec, print), daemon=True).start()
        while len(begun(worker)) < devices:
            time.sleep(0.002)
        for number in begun(worker):
            os.kill(number, signal.SIGSTOP)
        print(*begun(worker), flush=True)
        if devices == 1:
            time.sleep(0.2)  # the request is in the pipe
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
