"""How large and how deep a file may be before a parser reads it: generous for what the project
reads, and far below what makes a parser slow or ends the process.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

from finrepro import strict_json

MIB = 2**20
SETTINGS_BYTES = 4 * MIB  # a configuration file
JSON_BYTES = 256 * MIB  # a document of JSON
DEPTH = 100  # collections within collections
TOO_DEEP = f"nested more than {DEPTH} deep, the deepest that is read"
NODES = 1_000_000  # of YAML, with its aliases written out
MEMBER_BYTES = 1024 * MIB  # a member of an archive, unpacked
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]', re.DOTALL)


class TooLarge(ValueError):
    """A file is beyond a bound, which the message says."""


def read_text(path: Path, limit: int = JSON_BYTES) -> str:
    """A text file of at most `limit` bytes. Raises `TooLarge`, `OSError` and
    `UnicodeDecodeError`.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TooLarge(f"more than {limit // MIB} MiB, the largest that is read")
    return content.decode()


def check_depth(text: str) -> None:
    """Raise `TooLarge` for brackets that lie deeper than `DEPTH`."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        mark = match.group()
        depth += (mark in "[{") - (mark in "]}")
        if depth > DEPTH:
            raise TooLarge(TOO_DEEP)


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises as `read_text`, and `ValueError` for what is no JSON."""
    text = read_text(path)
    check_depth(text)
    return strict_json.loads(text)


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
