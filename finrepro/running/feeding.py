"""What a cell does about a corpus that is not finished: whether it can be had at all, and a process that prepares it during training."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from finrepro import PROJECT
from finrepro.catalogue import reader
from finrepro.catalogue.spec import RunSpec, TaskSpec
from finrepro.data.corpora import place as corpora
from finrepro.data.preparing import underway
from finrepro.data.preparing.prepare import default_workers
from finrepro.data.tokens import tokenizer_digest
from finrepro.errors import EnvironmentFault, Unavailable
from finrepro.evidence.place import Place
from finrepro.models import checkpoints
from finrepro.runtime import process

END_SECONDS = 20


def missing_reason(spec: RunSpec, task: TaskSpec, place: Place) -> str | None:
    """Why the cell cannot be trained on the task's corpus here, in one line that says what to do; None if it can.

    One that is not finished will do where the task reads it as it arrives, alone, and it is being prepared or can be by the cell itself.
    """
    name = corpora.corpus_of(task)
    reason = corpora.missing_reason(name, place.data_dir) if name else None
    folder = corpora.folder_of(name, place.data_dir) if name else None
    if reason is None or folder is None or not is_fed(spec, task):
        return reason
    if underway.held(folder):
        return None
    if tokenizer_for(spec, folder, place.models_dir) is None:
        return (
            f"{reason}, or put the tokenizer of {spec.model.name} under --models-dir: the cell then prepares it itself"
        )
    return None if _writable(folder) else reason


def is_fed(spec: RunSpec, task: TaskSpec) -> bool:
    """Whether the cell can begin before the task's corpus is finished. Those that are mixed have to be: how much each has is asked."""
    return corpora.block_of(task) is not None and len(spec.train_on.parts) == 1


def tokenizer_for(spec: RunSpec, folder: Path, models_dir: Path | None) -> Path | None:
    """The tokenizer that the corpus is prepared with: the one beside its shards, the model's, or that of the model it is compared with."""
    if tokenizer_digest(folder / corpora.TOKENIZER) is not None:
        return folder / corpora.TOKENIZER
    models = [reader.origin(spec.model)]
    models += [reader.model(spec.model.compared_with)] if spec.model.compared_with else []
    found = (checkpoints.tokenizer_folder(each, models_dir) for each in models)
    return next((each for each in found if each is not None), None)


def _writable(folder: Path) -> bool:
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return os.access(there, os.W_OK)


@contextlib.contextmanager
def fed(spec: RunSpec, place: Place) -> Iterator[Callable[[], bool]]:
    """While inside, the first rank sees to it that the cell's corpus is prepared.

    Gives what is called by those who wait for it: whether a process of this cell is at work on it; raises `EnvironmentFault` with the
    reason when that has failed.
    """
    feeders = [
        Feeder(str(corpora.corpus_of(part.task)), spec, place)
        for part in (spec.train_on.parts if spec.train.max_steps and process.ranks().is_main else ())
        if corpora.corpus_of(part.task) and is_fed(spec, part.task) and missing_reason(spec, part.task, place) is None
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
        """Start the process where nobody is at work; whether it is running. Raises `EnvironmentFault` when it has ended too early."""
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
        ended_with = f"{signal.Signals(-code).name} (out of memory?)" if code < 0 else f"exit status {code}"
        said = said or f"its process ended with {ended_with}, see {self.log}; run the same command again to go on."
        raise EnvironmentFault(f"corpus '{self.name}' cannot be prepared any further: {said}")

    def _start(self) -> None:
        tokenizer = tokenizer_for(self.spec, self.folder, self.place.models_dir)
        if tokenizer is None:  # somebody was preparing it, and has gone before the tokenizer lay beside the shards
            raise Unavailable(str(corpora.missing_reason(self.name, self.place.data_dir)))
        workers = max(1, default_workers() - self.spec.world_size)
        options = ["--tokenizer", tokenizer, "--out", self.folder, "--workers", workers, "--parent", os.getpid()]
        options += ["--data-dir", self.place.data_dir] if self.place.data_dir else []
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finrepro.data.arriving.feeder", self.name, *map(str, options)], cwd=PROJECT,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

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
