"""The manifest of a folder: every file's sha256, in the format that `sha256sum -c` checks
without this package.
"""

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from finrepro.errors import CellFailed

NAME = "manifest.sha256"
LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")
KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Damaged(CellFailed):
    """Files are no longer those that were sealed."""


def file_digest(path: Path) -> str:
    """sha256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """List every file's sha256, in the format of `sha256sum`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    lines = [f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, str] | None:
    """File name -> sha256; None for a manifest that is missing or is none."""
    path = folder / NAME
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a named pipe would be waited for
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    lines = [LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    listed = {match[2]: match[1] for match in lines if match}
    return listed if len(listed) == len(lines) and text.endswith("\n") else None


def damaged_files(
    folder: Path,
    digest: Callable[[Path], str] = file_digest,
    is_read: Callable[[str], bool] = lambda _: True,
) -> list[str]:
    """Names of files that are missing or differ from the manifest, that it does not list, or that
    are no files but links, pipes or devices (said so); and of a manifest that is none.

    `digest` gives a file's sha256. What `is_read` is false for has to be there, and is not read.
    """
    listed = read_manifest(folder)
    if listed is None:
        return [NAME]
    entries = {name: fault for name, fault in _entries(folder) if name != NAME}
    others = [f"{name} ({fault})" for name, fault in entries.items() if fault]
    read = {name for name in entries.keys() & listed.keys() if not entries[name] and is_read(name)}
    changed = {name for name in read if _digest(folder / name, digest) != listed[name]}
    missing, unlisted = listed.keys() - entries, entries.keys() - listed
    plain = {name for name in unlisted if not entries[name]}
    return sorted([*others, *changed, *missing, *plain])


def _entries(folder: Path) -> Iterator[tuple[str, str | None]]:
    """(name below `folder`, None for a file or what it is instead) of all but plain folders. No
    link is followed.
    """
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            found = list(os.scandir(folder / prefix))
        except OSError as error:
            yield prefix.rstrip("/") or ".", f"cannot be read: {error.strerror}"
            continue
        for entry in found:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append(f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name, None
            else:
                mode = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
                yield name, f"is {KINDS.get(mode, 'no file')}"


def _digest(path: Path, digest: Callable[[Path], str]) -> str | None:
    try:
        return digest(path)
    except OSError:
        return None
