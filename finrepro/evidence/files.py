"""Writing and reading files: the old content or the new, never a part; a full disk is one line."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from finrepro import bounds, strict_json
from finrepro.errors import DiskFull, EnvironmentFault, FinreproError, StoreGone

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Writers that wrap the system's error: torch, safetensors and tokenizers, NumPy, SQLite.
FULL_TEXT = re.compile(
    r"inline_container.*(unexpected pos|failed writing)"
    rf"|\(os error ({'|'.join(map(str, FULL))})\)"
    r"|\d+ requested and \d+ written"
    r"|database or disk is full",
    re.DOTALL,
)
# SQLite's word for any write that failed otherwise: also one beyond a quota, which it does not tell
# from a failing disk.
FAILING_TEXT = "disk I/O error"
GONE = (errno.ENOENT, errno.ESTALE)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def disk_errors(
    place: Path, kept: str = "finished cells are kept", option: str = "--store DIR"
) -> Iterator[None]:
    """Turn a full disk or a refused write into one line: what is `kept`, and the `option` that
    names another place.
    """
    try:
        yield
    except FinreproError:
        raise
    except Exception as error:
        if is_full(error):
            raise DiskFull(f"no space left for {place}{_named(error)}; {kept}.") from None
        number = error.errno if isinstance(error, OSError) else None
        if number in GONE and not place.exists():
            raise StoreGone(
                f"{place} is not there any more ({os.strerror(number or 0)}); was it renamed or "
                "removed meanwhile?"
            ) from None
        if number in REFUSED:
            raise EnvironmentFault(
                f"{place} is not writable ({os.strerror(number or 0)}); "
                f"choose another with {option}."
            ) from None
        if number == errno.EIO or FAILING_TEXT in str(error):
            raise EnvironmentFault(
                f"{place} cannot be written ({FAILING_TEXT}): the disk is full, its quota is used "
                f"up, or it fails; {kept}."
            ) from None
        raise


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that a disk is full, or what it was raised for does."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL or FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _named(error: Exception) -> str:
    return f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""


def flush(file: BinaryIO) -> None:
    """Flush a file onto the disk: a file system may report a full one only here."""
    file.flush()
    os.fsync(file.fileno())


def partial_of(path: Path) -> Path:
    """The hidden name beside `path` under which its content is written, one a process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write through a temporary file: the old content or the new, never a part.

    `durable`: on the disk, with its name, before the call returns, so that nothing done later can
    outlive it.
    """
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            if durable:
                flush(file)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to write into. It takes the target's name, and the place of
    an older one, at the end of the block; on any error it is removed.
    """
    partial = partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write text, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int = 2, durable: bool = False) -> None:
    """Write JSON, as `write_bytes` does."""
    write_bytes(path, json_text(value, indent).encode(), durable=durable)


def json_text(value: Any, indent: int = 2) -> str:
    """A value as the JSON of the store's files."""
    return strict_json.dumps(value, indent=indent, ensure_ascii=False) + "\n"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text(
        "".join(strict_json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; an absent file has none."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [bounds.loads(line) for line in bounds.lines(file) if line.strip()]
