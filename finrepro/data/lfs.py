"""Git LFS pointers: small files of text that a clone leaves in the place of large ones."""

from pathlib import Path

BEGINNING = b"version https://git-lfs.github.com/spec/"
ADVICE = "a Git LFS pointer in the place of the file: fetch it with `git lfs pull`"


def is_pointer(path: Path) -> bool:
    """Whether a file is such a pointer. Raises `OSError` where it cannot be read."""
    with path.open("rb") as file:
        return file.read(len(BEGINNING)) == BEGINNING
