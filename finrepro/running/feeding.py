"""A corpus that is prepared while a cell is trained on it: the process that does so."""

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
from finrepro.planning.availability import is_fed, missing_corpus, tokenizer_for
from finrepro.runtime import ranks

END_SECONDS = 20


@contextlib.contextmanager
def preparing_corpus(spec: RunSpec, place: Place) -> Iterator[Callable[[], bool]]:
    """Inside, the first rank keeps a process alive that prepares the cell's corpus, where it is
    trained on one that is not finished.

    Yields `keep_alive`, which whoever waits for text calls: it starts the process again where
    needed, and returns whether it is running. It raises `EnvironmentFault` with the reason when
    the preparation has failed.
    """
    feeders = [
        Feeder(str(corpora.corpus_of(part.task)), spec, place)
        for part in (
            spec.train_on.parts if spec.train.max_steps and ranks.current().is_main else ()
        )
        if corpora.corpus_of(part.task)
        and is_fed(spec, part.task)
        and missing_corpus(spec, part.task, place) is None
    ]
    try:
        for feeder in feeders:
            feeder.keep_alive()
        yield lambda: any(feeder.keep_alive() for feeder in feeders)
    finally:
        for feeder in feeders:
            feeder.end()


class Feeder:
    """The process that prepares one corpus, unless another one does or it is finished."""

    def __init__(self, name: str, spec: RunSpec, place: Place) -> None:
        self.name, self.spec, self.place = name, spec, place
        folder = corpora.folder_of(name, place.data_dir)
        assert folder is not None
        self.folder = folder
        self.log = place.store.results / "logs" / f"feeder-{name}.log"
        self.process: subprocess.Popen[str] | None = None

    def keep_alive(self) -> bool:
        """Start the process where no other prepares the corpus; whether it is running. Raises
        `EnvironmentFault` when it has ended too early.
        """
        if underway.is_finished(self.folder):
            return False
        if self.process is None:
            if underway.is_locked(self.folder):
                return False
            self._start()
            return True
        if self.process.poll() is None:
            return True
        ended, self.process = self.process, None
        assert ended.stdout is not None
        with ended.stdout:
            reason = ended.stdout.read().strip()
        code = ended.returncode
        if code == underway.LOCKED:  # another one was there first, and may have gone meanwhile
            return self.keep_alive()
        if underway.is_finished(self.folder) or underway.is_locked(self.folder):
            return False
        if not reason:
            end = f"exit status {code}"
            if code < 0:
                end = f"{signal.Signals(-code).name} (out of memory?)"
            reason = (
                f"its process ended with {end}, see {self.log}; run the same command again to go "
                "on."
            )
        raise EnvironmentFault(f"corpus '{self.name}' cannot be prepared any further: {reason}")

    def _start(self) -> None:
        tokenizer = tokenizer_for(self.spec, self.folder, self.place.models_dir)
        # None: another process was preparing it, and ended before it had written the tokenizer.
        if tokenizer is None:
            raise Unavailable(str(corpora.unprepared_reason(self.name, self.place.data_dir)))
        workers = max(1, default_workers() - self.spec.world_size)
        options: dict[str, object] = {
            "--tokenizer": tokenizer,
            "--out": self.folder,
            "--workers": workers,
            "--parent": os.getpid(),
        }
        if self.place.data_dir:
            options["--data-dir"] = self.place.data_dir
        arguments = [str(word) for option in options.items() for word in option]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finrepro.data.arriving.feeder", self.name, *arguments],
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
