"""The lock of a store: whoever writes it holds it, and so does every process that it starts.

The system's lock (flock) belongs to an open file and not to a process. Children that inherit the
file keep the store locked as long as one of them lives, however their parent ended.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from finrepro.errors import EnvironmentFault

PATIENCE = 20.0  # seconds for the children of a dead holder to end


@contextlib.contextmanager
def held(path: Path, root: Path, *, shared: bool = False) -> Iterator[int]:
    """Hold the lock file at `path` of the store at `root` alone, or `shared` with others that share
    it; its descriptor, for children to inherit.

    Waits for the children of a holder that is dead. Raises `EnvironmentFault` naming a living
    holder, and where there can be no lock.
    """
    try:
        file = path.open("a+")
    except IsADirectoryError:
        raise EnvironmentFault(
            f"{path} is a folder, and should be the store's lock: move it away."
        ) from None
    with file:
        _lock(file, root, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        if not shared:
            file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


def is_there(path: Path, descriptor: int) -> bool:
    """Whether the held lock still lies at `path`: a store may be renamed or removed under it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _lock(file: TextIO, root: Path, kind: int) -> None:
    """Take the lock; raises as `held` does."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holders = file.read().split() or ["unknown"]
            living = [holder for holder in holders if not is_dead(holder)]
            if living or time.monotonic() > deadline:
                raise EnvironmentFault(
                    f"another command (process {(living or holders)[-1]}) is working in {root}; "
                    "wait for it or choose another --store."
                ) from None
            time.sleep(0.05)
        except OSError as error:
            raise EnvironmentFault(
                f"{root} cannot be locked ({error.strerror}); choose another with --store DIR."
            ) from None


def is_dead(process: str) -> bool:
    """Whether `process` is the id of a process that has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return process.isdecimal()
    except OSError:
        return False
    return fields[0] in "ZX"  # nobody has asked yet how it ended
