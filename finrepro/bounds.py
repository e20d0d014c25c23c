"""How large and how deep a file may be before a parser reads it: generous for what the project
reads, and far below what makes a parser slow or ends the process.
"""

import re
import zipfile
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from finrepro import strict_json

MIB = 2**20
SETTINGS_BYTES = 4 * MIB  # a configuration file
JSON_BYTES = 256 * MIB  # a document of JSON
DEPTH = 100  # collections within collections
TOO_DEEP = f"nested more than {DEPTH} deep, the deepest that is read"
NODES = 1_000_000  # of YAML, with its aliases written out
MEMBER_BYTES = 1024 * MIB  # a file of data, or a member of an archive, unpacked
LINE_BYTES = 64 * MIB  # a line of JSON
_NO_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"|[^][{}"]++', re.DOTALL)


class TooLarge(ValueError):
    """A file is beyond a bound, which the message says."""


def read_bytes(path: Path, limit: int = JSON_BYTES) -> bytes:
    """A file of at most `limit` bytes. Raises `TooLarge` and `OSError`."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TooLarge(_longer_than(limit))
    return content


def read_text(path: Path, limit: int = JSON_BYTES) -> str:
    """A text file of at most `limit` bytes. Raises as `read_bytes`, and `UnicodeDecodeError`."""
    return read_bytes(path, limit).decode()


def _longer_than(limit: int) -> str:
    size = f"{limit // MIB} MiB" if limit >= MIB else f"{limit} bytes"
    return f"more than {size}, the largest that is read"


def check_depth(text: str) -> None:
    """Raise `TooLarge` for brackets that lie deeper than `DEPTH`."""
    if text.count("[") + text.count("{") <= DEPTH:
        return
    depth = 0
    for mark in _NO_BRACKETS.sub("", text):
        depth += (mark in "[{") - (mark in "]}")
        if depth > DEPTH:
            raise TooLarge(TOO_DEEP)


def loads(text: str | bytes) -> Any:
    """The value of a JSON text, in UTF-8. Raises `TooLarge`, and `ValueError` for what is none."""
    if len(text) > JSON_BYTES:
        raise TooLarge(_longer_than(JSON_BYTES))
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    check_depth(text)
    return strict_json.loads(text)


def read_json(path: Path, limit: int = JSON_BYTES) -> Any:
    """The value in a JSON file. Raises as `read_bytes` and `loads`."""
    return loads(read_text(path, limit))


def check_json(path: Path) -> None:
    """Bounds for a JSON file that a library will read. Raises as `read_text`."""
    check_depth(read_text(path))


def lines(file: BufferedIOBase) -> Iterator[bytes]:
    """The lines of a file. Raises `TooLarge` for one of more than `LINE_BYTES`."""
    while line := file.readline(LINE_BYTES + 1):
        if len(line) > LINE_BYTES:
            raise TooLarge(f"a line of {_longer_than(LINE_BYTES)}")
        yield line


def check_nodes(value: Any) -> None:
    """Raise `TooLarge` for a value whose shared parts, each written out, are more than `NODES`
    values: aliases of aliases grow by a power of their number.
    """
    sizes: dict[int, int] = {}

    def size(part: Any) -> int:
        if not isinstance(part, dict | list):
            return 1
        if id(part) not in sizes:
            sizes[id(part)] = NODES  # should it contain itself
            inner = part.values() if isinstance(part, dict) else part
            sizes[id(part)] = 1 + sum(map(size, inner))
        return sizes[id(part)]

    if size(value) > NODES:
        raise TooLarge(f"more than {NODES:,} values with its aliases, the most that is read")


def unpack(archive: zipfile.ZipFile, member: str) -> bytes:
    """A member of an archive. Raises `TooLarge`, whatever size the archive claims for it."""
    with archive.open(member) as file:
        content = file.read(MEMBER_BYTES + 1)
    if len(content) > MEMBER_BYTES:
        raise TooLarge(f"{member}: more than {MEMBER_BYTES // MIB} MiB unpacked")
    return content
