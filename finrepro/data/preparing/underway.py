"""What others see of a preparation that has not ended: what it is of, whether somebody is at
work on it, and why it was given up.
"""

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path

from finrepro.data.corpora.index import INDEX, Begun
from finrepro.data.preparing.writer import PREPARING
from finrepro.errors import EnvironmentFault, FinreproError
from finrepro.settings import build

BEGUN, LOCK, FAILURE = "options.json", ".lock", "failure.txt"
TRIES, TRY_SECONDS = 10, 0.05
HELD = (
    75  # a feeder's exit status when another process is at work there (EX_TEMPFAIL of sysexits.h)
)


def is_finished(folder: Path) -> bool:
    """Whether the index is there, which is written last."""
    return (folder / INDEX).is_file()


def begun(folder: Path) -> Begun | None:
    """What a preparation that has not ended is of; None where none was begun. Raises
    `EnvironmentFault` for a note that cannot be read.
    """
    path = folder / PREPARING / BEGUN
    try:
        return build(Begun, dict(json.loads(path.read_text(encoding="utf-8"))), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (FinreproError, ValueError, TypeError):
        raise EnvironmentFault(
            f"{path} is damaged: delete {path.parent}, and begin again."
        ) from None


class Held(EnvironmentFault):
    """Another process is at work there."""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder; the system lets go of it when the process dies. A failure inside is noted
    for those who wait for shards.

    Raises `Held` where another process is.
    """
    with (folder / PREPARING / LOCK).open("a") as file:
        for left in reversed(range(TRIES)):  # who only looks (`held`) has it for a moment, too
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not left:
                    raise Held(
                        f"another process is preparing {folder}; wait for it or choose another --out."
                    ) from None
                time.sleep(TRY_SECONDS)
        note = folder / PREPARING / FAILURE
        note.unlink(missing_ok=True)
        try:
            yield
        except FinreproError as error:
            with contextlib.suppress(
                OSError
            ):  # a full disk, or a folder that is not ours and was left as it was
                note.write_text(" ".join(str(error).split()), encoding="utf-8")
            raise


def held(folder: Path) -> bool:
    """Whether a process is at work there now."""
    try:
        with (folder / PREPARING / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def failure(folder: Path) -> str | None:
    """Why the last one who was at work there gave up, None if that is not known."""
    try:
        return (folder / PREPARING / FAILURE).read_text(encoding="utf-8") or None
    except OSError:
        return None
