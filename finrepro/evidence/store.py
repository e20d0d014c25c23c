"""The store: one folder a run, whole or absent, with a manifest of sha256 that `sha256sum -c`
checks.

A run is written to a hidden folder beside its final place and renamed there when every byte is on
disk. What is found half-written after a crash is swept away by the next command that locks the
store. MLflow's view of it is made by finrepro.tracking.view.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finrepro import INSTALLED, PROJECT
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import EnvironmentFault, StoreGone
from finrepro.evidence import lock, provenance, schema
from finrepro.evidence.files import disk_errors, write_json
from finrepro.evidence.manifest import write_manifest

FORMAT = 1  # of the folder; that of a result is finrepro.evidence.schema.FORMAT
DONE, FAILED, DIVERGED, SKIPPED = "done", "failed", "diverged", "skipped"
STALE, MISSING = "stale", "not run"


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

    def result(self, run_id: str) -> dict[str, Any] | None:
        """A run's result.json (finrepro.evidence.schema), None if there is none that can be read.
        Raises `EnvironmentFault` for one of another format.
        """
        return schema.read(self.run_folder(run_id) / "result.json")

    def state(self, spec: RunSpec) -> str:
        """`done`, `stale`, `failed`, `diverged`, `skipped` or `not run`.

        Stale: the result, or a base that its table makes, was made by other source or locked
        packages, or the base is another by now.
        """
        result = self.result(spec.run_id)
        return MISSING if result is None else self.state_of(result)

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
        try:
            lines = (
                (self.run_folder(run_id) / "manifest.sha256")
                .read_text(encoding="utf-8")
                .splitlines()
            )
        except (OSError, ValueError):
            return None
        weights = "\n".join(line for line in lines if "  weights/" in line)
        return hashlib.sha256(weights.encode()).hexdigest()

    def log_scoring(self, spec: RunSpec, task: str) -> None:
        """Note that a split is scored, before it is: an attempt that failed or was thrown away
        still counts.
        """
        row = {
            "run_id": spec.run_id,
            "label": spec.label,
            "task": task,
            "split": spec.evaluation.split,
        }
        with (
            disk_errors(self.root),
            (self.results / "scorings.jsonl").open("a", encoding="utf-8") as file,
        ):
            file.write("\n" + json.dumps({**row, "time": time.time()}))

    def times_scored(self, spec: RunSpec) -> int:
        """How often this configuration's split has been scored in this store: tuning on a test
        set would show here.
        """
        try:
            lines = (self.results / "scorings.jsonl").read_text(encoding="utf-8").split("\n")
        except OSError:
            return 0
        # A line cut off by a crash is no reason to fail.
        return sum(f'"run_id": "{spec.run_id}"' in line for line in lines)

    def campaigns(self) -> list[dict[str, Any]]:
        """Every campaign's record, oldest first. Raises `EnvironmentFault` naming one that
        cannot be read.
        """
        campaigns = []
        for path in (self.results / "campaigns").glob("*.json"):
            try:
                campaigns.append(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                raise EnvironmentFault(
                    f"{path} is damaged; move it away and run the command again."
                ) from None
        return sorted(campaigns, key=lambda campaign: float(campaign["started"]))

    @contextlib.contextmanager
    def new_run(self, run_id: str) -> Iterator[Path]:
        """A folder to fill; on leaving it is sealed with a manifest and takes the place of an older
        result.

        A finished result that an unfinished one replaces is not thrown away: it is kept under
        results/superseded.
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
                old = final.with_name(f".{run_id}.{os.getpid()}.old")
                replaced = self.result(run_id)
                if final.exists():
                    final.rename(old)
                partial.rename(final)
                status = (self.result(run_id) or {}).get("status")
                if replaced and replaced["status"] == DONE != status:
                    superseded = self.results / "superseded" / f"{run_id}-{int(replaced['ended'])}"
                    superseded.parent.mkdir(exist_ok=True)
                    old.rename(superseded)
                _sync(final.parent)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

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
        written = json.loads(mark.read_text(encoding="utf-8"))["format"]
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
