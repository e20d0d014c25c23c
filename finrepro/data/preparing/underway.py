"""What other processes see of an unfinished preparation: what it is made from, whether a process is
at work on it, and why the last one stopped.
"""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from finrepro import bounds
from finrepro.data.corpora.index import INDEX, Unfinished
from finrepro.data.preparing.writer import PREPARING
from finrepro.errors import EnvironmentFault, FinreproError
from finrepro.settings import build

OPTIONS, LOCK, FAILURE = "options.json", ".lock", "failure.txt"
TRIES, TRY_SECONDS = 10, 0.05
# A feeder's exit status when another process holds the lock (EX_TEMPFAIL of sysexits.h).
LOCKED = 75


def is_finished(folder: Path) -> bool:
    """Whether the index is there, which is written last."""
    return (folder / INDEX).is_file()


def unfinished(folder: Path) -> Unfinished | None:
    """What an unfinished preparation is made from; None where there is none. Raises
    `EnvironmentFault` where its options cannot be read.
    """
    path = folder / PREPARING / OPTIONS
    try:
        return build(Unfinished, dict(bounds.read_json(path)), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (FinreproError, ValueError, TypeError):
        raise EnvironmentFault(
            f"{path} is damaged: delete {path.parent}, and begin again."
        ) from None


class Locked(EnvironmentFault):
    """Another process prepares the folder."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock the folder; the system releases it when the process dies. An error inside is written
    down for the processes that wait for shards.

    Raises `Locked` where another process has the lock.
    """
    with (folder / PREPARING / LOCK).open("a") as file:
        # `is_locked` takes a shared lock for a moment, so one failure does not decide.
        for tries_left in reversed(range(TRIES)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not tries_left:
                    raise Locked(
                        f"another process is preparing {folder}; "
                        "wait for it or choose another --out."
                    ) from None
                time.sleep(TRY_SECONDS)
        failure_file = folder / PREPARING / FAILURE
        failure_file.unlink(missing_ok=True)
        try:
            yield
        except FinreproError as error:
            # Not possible on a full disk, or in a folder that holds something else.
            with contextlib.suppress(OSError):
                failure_file.write_text(" ".join(str(error).split()), encoding="utf-8")
            raise


def is_locked(folder: Path) -> bool:
    """Whether a process prepares the folder now."""
    try:
        with (folder / PREPARING / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def failure(folder: Path) -> str | None:
    """Why the last preparing process stopped, None if that is not known."""
    try:
        return (folder / PREPARING / FAILURE).read_text(encoding="utf-8") or None
    except OSError:
        return None
