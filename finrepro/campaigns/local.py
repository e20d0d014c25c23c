"""The driver's handle on a process that runs cells on this machine."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import psutil

from finrepro import PACKAGE, strict_json
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec, Scale
from finrepro.errors import EnvironmentFault
from finrepro.evidence import provenance
from finrepro.evidence.place import Place
from finrepro.running.events import DRIVER, Event
from finrepro.running.launch import command, request
from finrepro.runtime import process as runtime

FIRST_FAILURE = re.compile(
    r"first observed failure.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+[^\n]*)", re.DOTALL
)


ENDS = ("result", "interrupted", "fault")  # the last event of a cell


class Worker:
    """The driver's side: starts the process when needed, sends it a cell, passes on its events."""

    def __init__(
        self,
        place: Place,
        selection: Selection,
        scale: Scale,
        log: Path,
        environment: Mapping[str, str] | None = None,
        lock: int | None = None,
    ) -> None:
        self.place, self.selection, self.scale, self.log = place, selection, scale, log
        self.lock = lock  # the store's, which stays locked until the processes are dead, too
        self.environment = os.environ | (environment or {}) | {DRIVER: str(os.getpid())}
        self.process: subprocess.Popen[str] | None = None
        self.launched: subprocess.Popen[str] | None = None
        self.closed = False

    def start(self) -> None:
        """Start the process if it is not running."""
        if self.process is None or self.process.poll() is not None:
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "finrepro.running.worker"],
                    cwd=PACKAGE.parent,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=self.environment,
                    pass_fds=() if self.lock is None else (self.lock,),
                )

    def run(self, spec: RunSpec, on_event: Callable[[Event], None]) -> Event:
        """Run a cell; its last event: `result`, `interrupted`, `fault`, or `died` with the
        signal or the last line of the log.
        """
        if self.closed:  # a fault of another cell has ended the campaign
            return {"event": "interrupted", "reason": "stopped"}
        if spec.world_size > 1:
            return self._launch(spec, on_event)
        self.start()
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        message = {
            "request": request(spec, self.selection, self.scale),
            "store": str(self.place.store.root),
            "data_dir": self.place.data_dir and str(self.place.data_dir),
            "models_dir": self.place.models_dir and str(self.place.models_dir),
        }
        try:
            process.stdin.write(strict_json.dumps(message) + "\n")
            process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it died, or was closed just now
            return self._died(process)
        for event in _events(process.stdout):
            if event["event"] in ENDS:
                return event
            on_event(event)
        return self._died(process)

    def _launch(self, spec: RunSpec, on_event: Callable[[Event], None]) -> Event:
        """Run a cell on several ranks, each a process of its own; the first one reports."""
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [
                    *command(spec, self.selection, self.scale, self.place),
                    "--run-id",
                    spec.run_id,
                    "--source",
                    provenance.source_digest(),
                ],
                cwd=PACKAGE.parent,
                # The one open file that torchrun hands on to the ranks.
                stdin=subprocess.DEVNULL if self.lock is None else self.lock,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment | {"OMP_NUM_THREADS": str(spec.threads)},
                start_new_session=True,
                preexec_fn=runtime.die_with_parent,
            )
        self.launched = process
        last: Event | None = None
        elsewhere: list[str] = []
        assert process.stdout is not None
        for event in _events(process.stdout):
            if event["event"] in ENDS:
                last = event
            elif event["event"] == "rank":
                elsewhere.append(f"rank {event['rank']}: {event['reason']}")
            else:
                on_event(event)
        process.wait()
        if last and last.get("exit_code") == EnvironmentFault.exit_code:
            return last
        if elsewhere:  # the first rank saw at most that another was gone
            return {
                "event": "died",
                "reason": "; ".join([*elsewhere, *([f"rank 0: {last['reason']}"] if last else [])]),
            }
        return last or self._died(process)

    def _died(self, process: "subprocess.Popen[str]") -> Event:
        code = process.wait()
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        first = FIRST_FAILURE.findall("\n".join(lines))  # of several ranks, as torchrun tells it
        if first and self.launched is process:
            return {
                "event": "died",
                "reason": "rank {} ended first, with exit code {}".format(*first[-1]),
            }
        last = f": {lines[-1][:200]}" if lines and code >= 0 else ""
        return {"event": "died", "reason": f"its process ended with {cause}{hint}{last}"}

    def interrupt(self) -> None:
        """Ask the running cell to save and stop, and take no other."""
        self.closed = True
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
        if self.launched is not None and self.launched.poll() is None:
            # The ranks, not torchrun: it would kill them thirty seconds later, and a large
            # checkpoint takes longer.
            with contextlib.suppress(psutil.Error):
                ranks = psutil.Process(self.launched.pid).children()
                for rank in ranks:
                    rank.terminate()
                if not ranks:
                    self.launched.terminate()

    def close(self) -> None:
        """Let the process end; it has nothing left to do."""
        self.closed = True
        if self.process is not None:
            if self.process.stdin is not None:
                self.process.stdin.close()
            self.process.wait()
        if self.launched is not None:
            self.launched.wait()


def _events(lines: Iterable[str]) -> Iterator[Event]:
    """The events among the lines of a process; a line that its end cut off is none."""
    return (
        strict_json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")
    )
