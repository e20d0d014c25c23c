"""The store: one folder a run, whole or absent, with a manifest of sha256 that `sha256sum -c`
checks.

A run is written to a hidden folder beside its final place and renamed there when every byte is on
disk. What is found half-written after a crash is swept away by the next command that locks the
store. MLflow's view of it is made by finrepro.tracking.view.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finrepro import INSTALLED, PROJECT, bounds
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import EnvironmentFault, StoreGone
from finrepro.evidence import lock, provenance, schema
from finrepro.evidence.digests import Digests, kept_in
from finrepro.evidence.files import disk_errors, write_json
from finrepro.evidence.kept import beside, kept
from finrepro.evidence.manifest import Damaged, read_manifest, write_manifest
from finrepro.evidence.run_faults import RESULT, read_run
from finrepro.evidence.scorings import Scorings
from finrepro.evidence.sealed import read_sealed

FORMAT = 1  # of the folder; that of a result is finrepro.evidence.schema.FORMAT
DONE, FAILED, DIVERGED, SKIPPED = "done", "failed", "diverged", "skipped"
STALE, MISSING, DAMAGED = "stale", "not run", "damaged"


@dataclass(frozen=True)
class Found:
    """What a store has of a run: `done`, `stale`, `failed`, `diverged`, `skipped`, `not run` or
    `damaged`; its result, None where there is none that can be trusted; what is wrong with it.

    Stale: the result, or a base that its table makes, was made by other source or locked packages,
    or the base is another by now.
    """

    state: str
    result: dict[str, Any] | None = None
    faults: Sequence[str] = ()


@dataclass(frozen=True)
class Store:
    """A folder with `results/` (the evidence) and `mlruns/` (MLflow's view of it)."""

    root: Path

    @property
    def results(self) -> Path:
        """runs/, campaigns/, tables/, checkpoints/, logs/ and cache/."""
        return self.root / "results"

    @property
    def cache(self) -> Path:
        """What can be computed again, and may be deleted at any time."""
        return self.results / "cache"

    def run_folder(self, run_id: str) -> Path:
        """Where a run's result lies once it is whole."""
        return self.results / "runs" / run_id

    def checkpoints(self, run_id: str) -> Path:
        """Where an unfinished run keeps its checkpoint."""
        return self.results / "checkpoints" / run_id

    @property
    def digests(self) -> Digests:
        """sha256 of this store's files, and of what its cells read, once a file."""
        return kept_in(self.cache / "sha256")

    def found(self, run_id: str, weights: bool = False) -> Found:
        """What the store has of a run, held against its seal. The contents of `weights/` are read
        only where they are asked for. Raises `EnvironmentFault` for a result of another format.
        """
        folder = self.run_folder(run_id)
        if not os.path.lexists(folder):
            return Found(MISSING)
        result, faults = read_run(folder, self.digests.of, weights)
        return Found(DAMAGED, faults=faults) if faults else Found(self.state_of(result), result)

    def result(self, run_id: str) -> dict[str, Any] | None:
        """A run's result.json (finrepro.evidence.schema); None if there is none, or the run is
        damaged. Raises as `found` does.
        """
        return self.found(run_id).result

    def state(self, spec: RunSpec) -> str:
        """The state of a cell, as in `Found`."""
        return self.found(spec.run_id).state

    def attempt(self, run_id: str) -> dict[str, Any] | None:
        """The last result that did not take the place of a finished one, None if there is none
        that is newer.
        """
        found = [schema.read(path / RESULT) for path in kept(self.results / "attempts", run_id)]
        last = max((each for each in found if each), key=lambda each: each["ended"], default=None)
        here = self.result(run_id)
        return last if last and here and last["ended"] > here["ended"] else None

    def check(self, run_id: str) -> dict[str, Any]:
        """A run's result, {} where there is none. Raises `EnvironmentFault` unless every file of
        the run, weights too, is what was sealed.
        """
        found = self.found(run_id, weights=True)
        if found.faults:
            raise EnvironmentFault(f"run {run_id} is damaged ({', '.join(found.faults)})")
        return found.result or {}

    def state_of(self, result: dict[str, Any]) -> str:
        """`state` of a result that is here."""
        if result["status"] != DONE:
            return str(result["status"])
        digests = (provenance.source_digest(), provenance.lock_digest())
        base = result["data"].get("base") or {}
        makers = [result["environment"], *([base] if "source_digest" in base else [])]
        same_base = "run_id" not in base or self.weights_digest(base["run_id"]) in (
            None,
            base["weights"],
        )
        same_makers = all(
            (maker["source_digest"], maker["lock_digest"]) == digests for maker in makers
        )
        return DONE if same_makers and same_base else STALE

    def weights_digest(self, run_id: str) -> str | None:
        """sha256 over the manifest's lines of what a run has trained; None if the run is not
        here.
        """
        listed = read_manifest(self.run_folder(run_id))
        if listed is None:
            return None
        weights = [f"{sha}  {name}" for name, sha in listed.items() if name.startswith("weights/")]
        return hashlib.sha256("\n".join(weights).encode()).hexdigest()

    @property
    def scorings(self) -> Scorings:
        """Which split was scored when, over all attempts."""
        return Scorings(self.results / "scorings.jsonl")

    def campaigns(self) -> list[dict[str, Any]]:
        """Every campaign's record, oldest first. Raises `EnvironmentFault` naming one that
        cannot be read.
        """
        campaigns = []
        for path in (self.results / "campaigns").glob("*.json"):
            try:
                campaigns.append(read_sealed(path, older=True) or {})
            except Damaged:
                raise EnvironmentFault(
                    f"{path} is damaged; move it away and run the command again."
                ) from None
        return sorted(campaigns, key=lambda campaign: float(campaign["started"]))

    @contextlib.contextmanager
    def new_run(self, run_id: str) -> Iterator[Path]:
        """A folder to fill; on leaving it is sealed with a manifest and takes its place.

        Nothing finished is thrown away: a finished result that another one replaces is kept under
        results/superseded, and what is damaged under results/damaged. An unfinished run never takes
        the place of a finished one: it is kept under results/attempts.
        """
        final = self.run_folder(run_id)
        partial = final.with_name(f".{run_id}.{os.getpid()}.partial")
        with disk_errors(self.root):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()  # not its parents: the store may be gone
            try:
                yield partial
                write_manifest(partial)
                for path in [*partial.rglob("*"), partial]:
                    _sync(path)
                self._put(partial, final)
                _sync(final.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def _put(self, partial: Path, final: Path) -> None:
        """Give a sealed run its place, and what lies there one beside."""
        new, old = schema.read(partial / RESULT) or {}, self.result(final.name)
        finished = old is not None and old["status"] == DONE
        if finished and new.get("status") != DONE:
            partial.rename(beside(self.results / "attempts", final.name, new))
            return
        if not os.path.lexists(final):
            partial.rename(final)
            return
        if self.found(final.name, weights=True).faults:
            final.rename(beside(self.results / "damaged", final.name, {}))
            partial.rename(final)
        elif finished:
            final.rename(beside(self.results / "superseded", final.name, old or {}))
            partial.rename(final)
        else:
            replaced = final.with_name(f".{final.name}.{os.getpid()}.old")
            final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[int]:
        """Hold the store alone, and sweep what a crash left half-written; or `shared` with cells
        that were started by hand. Its descriptor, for processes that write on behalf of this one:
        the system releases the store when the last of them has died.
        """
        with (
            disk_errors(self.root),
            lock.held(self.results / ".lock", self.root, shared=shared) as descriptor,
        ):
            if not shared:
                for leftover in (self.results / "runs").glob(".*.*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            yield descriptor

    def check_lock(self, descriptor: int) -> None:
        """Raise `StoreGone` where the store that was locked does not lie here any more."""
        if not lock.is_there(self.results / ".lock", descriptor):
            raise StoreGone(
                f"{self.root} was renamed or removed while it was in use; what had been finished "
                "lies in it. Run the same command again with its --store."
            )


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def default_root() -> Path:
    """`FINREPRO_STORE`; else the root of the checkout, or for an installed package the current
    folder.
    """
    return Path(os.environ.get("FINREPRO_STORE") or (Path.cwd() if INSTALLED else PROJECT))


def open_store(root: Path | None) -> Store:
    """The store at `root`, made if it is not there. Raises `EnvironmentFault` if it cannot be
    written or is of a newer version.
    """
    store = Store((root or default_root()).expanduser().absolute())
    with disk_errors(store.root):
        try:
            for name in ("runs", "campaigns", "tables", "checkpoints", "logs"):
                (store.results / name).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise EnvironmentFault(
                f"{store.root} is not a folder; choose another with --store DIR."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT):
                raise
            raise EnvironmentFault(
                f"{store.root} cannot be made ({error.strerror}); choose another with --store DIR."
            ) from None
        mark = store.results / "store.json"
        if not mark.exists():
            write_json(mark, {"format": FORMAT})
    try:
        written = bounds.read_json(mark)["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise EnvironmentFault(
            f'{mark} is damaged: it should say {{"format": {FORMAT}}}.'
        ) from None
    if written != FORMAT:
        raise EnvironmentFault(
            f"{store.root} was written by a newer finrepro (format {written}, this one reads "
            f"{FORMAT}); use that version, or another --store."
        )
    return store
