"""Writing and reading files: the old content or the new, never a part; a full disk is one line."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finrepro.errors import EnvironmentFault


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn a full disk or a refused write into one line."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # MLflow passes on SQLite's message in an exception of its own.
        if number in (errno.ENOSPC, errno.EDQUOT) or "database or disk is full" in str(error):
            raise EnvironmentFault(
                f"no space left on the disk of {place}; finished cells are kept."
            ) from None
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise EnvironmentFault(
                f"{place} is not writable ({os.strerror(number or 0)}); choose another with "
                "--store DIR."
            ) from None
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write through a temporary file: the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write text, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; an absent file has none."""
    # Not splitlines(): it would also break at U+2028 and its like, which JSON leaves as they are.
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines if line]
