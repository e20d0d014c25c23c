"""What a cell does about a corpus that is not finished: whether it can be had at all, and a
process that prepares it during training.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

from finrepro import PACKAGE
from finrepro.catalogue.spec import RunSpec
from finrepro.data.corpora import folders as corpora
from finrepro.data.preparing import underway
from finrepro.data.preparing.prepare import default_workers
from finrepro.errors import EnvironmentFault, Unavailable
from finrepro.evidence.place import Place
from finrepro.planning.availability import corpus_missing_reason, is_fed, tokenizer_for
from finrepro.runtime import ranks

END_SECONDS = 20


@contextlib.contextmanager
def fed(spec: RunSpec, place: Place) -> Iterator[Callable[[], bool]]:
    """While inside, the first rank sees to it that the cell's corpus is prepared.

    Gives what is called by those who wait for it: whether a process of this cell is at work on it;
    raises `EnvironmentFault` with the reason when that has failed.
    """
    feeders = [
        Feeder(str(corpora.corpus_of(part.task)), spec, place)
        for part in (
            spec.train_on.parts if spec.train.max_steps and ranks.current().is_main else ()
        )
        if corpora.corpus_of(part.task)
        and is_fed(spec, part.task)
        and corpus_missing_reason(spec, part.task, place) is None
    ]
    try:
        for each in feeders:
            each.tend()
        yield lambda: any(each.tend() for each in feeders)
    finally:
        for each in feeders:
            each.end()


class Feeder:
    """The process that prepares one corpus, unless somebody else does or nobody needs to."""

    def __init__(self, name: str, spec: RunSpec, place: Place) -> None:
        self.name, self.spec, self.place = name, spec, place
        folder = corpora.folder_of(name, place.data_dir)
        assert folder is not None
        self.folder = folder
        self.log = place.store.results / "logs" / f"feeder-{name}.log"
        self.process: subprocess.Popen[str] | None = None

    def tend(self) -> bool:
        """Start the process where nobody is at work; whether it is running. Raises
        `EnvironmentFault` when it has ended too early.
        """
        if underway.is_finished(self.folder):
            return False
        if self.process is None:
            if underway.held(self.folder):
                return False
            self._start()
            return True
        if self.process.poll() is None:
            return True
        ended, self.process = self.process, None
        assert ended.stdout is not None
        with ended.stdout:
            said = ended.stdout.read().strip()
        code = ended.returncode
        if code == underway.HELD:  # another one was there first, and may have gone meanwhile
            return self.tend()
        if underway.is_finished(self.folder) or underway.held(self.folder):
            return False
        ended_with = (
            f"{signal.Signals(-code).name} (out of memory?)" if code < 0 else f"exit status {code}"
        )
        said = (
            said
            or f"its process ended with {ended_with}, see {self.log}; run the same command again to go on."
        )
        raise EnvironmentFault(f"corpus '{self.name}' cannot be prepared any further: {said}")

    def _start(self) -> None:
        tokenizer = tokenizer_for(self.spec, self.folder, self.place.models_dir)
        if (
            tokenizer is None
        ):  # somebody was preparing it, and has gone before the tokenizer lay beside the shards
            raise Unavailable(str(corpora.unprepared_reason(self.name, self.place.data_dir)))
        workers = max(1, default_workers() - self.spec.world_size)
        options = [
            "--tokenizer",
            tokenizer,
            "--out",
            self.folder,
            "--workers",
            workers,
            "--parent",
            os.getpid(),
        ]
        options += ["--data-dir", self.place.data_dir] if self.place.data_dir else []
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "finrepro.data.arriving.feeder",
                    self.name,
                    *map(str, options),
                ],
                cwd=PACKAGE.parent,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def end(self) -> None:
        """End the process; whole shards stay, and the next one goes on with them."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
