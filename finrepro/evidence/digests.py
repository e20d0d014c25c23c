"""sha256 of files, each read once while it stays what it was: 140 GB of weights take minutes."""

import contextlib
import time
from functools import cache
from pathlib import Path
from typing import cast

from finrepro.evidence.manifest import file_digest

# Seconds. A file that changed less long ago is read again: file systems keep times this coarsely,
# so that two changes could look like one.
SETTLED = 2.0
Identity = tuple[int, int, int, int, int]


class Digests:
    """Digests by what the system says of a file: device, inode, size, times of content and of
    status. They are kept in `path`, a line a file, which may be deleted at any time.

    What changes bytes under the file system's feet is not seen this way; `record` reads every byte.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[Identity, str] = {}
        with contextlib.suppress(OSError):
            for line in path.read_text(encoding="ascii", errors="replace").splitlines():
                *numbers, digest = line.split(" ")
                if len(numbers) == 5 and len(digest) == 64 and "".join(numbers).isdecimal():
                    self._known[cast(Identity, tuple(map(int, numbers)))] = digest

    def of(self, path: Path) -> str:
        """sha256 of a file, which is read if it is not known as it is now."""
        identity = identity_of(path)
        known = self._known.get(identity)
        return known or self.read(path)

    def read(self, path: Path) -> str:
        """sha256 of a file, read again whatever is known."""
        identity, now = identity_of(path), time.time()
        digest = file_digest(path)
        if identity_of(path) == identity and max(identity[3:]) < (now - SETTLED) * 1e9:
            self._known[identity] = digest
            line = " ".join(map(str, (*identity, digest))) + "\n"
            # A store that cannot be written, or a full disk, is read all the same.
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="ascii") as file:
                    file.write(line)
        return digest


@cache
def kept_in(path: Path) -> Digests:
    """The digests of this process that are kept in `path`."""
    return Digests(path)


def identity_of(path: Path) -> Identity:
    """What tells whether a file is still the same: device, inode, bytes, times in ns."""
    status = path.stat()
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
