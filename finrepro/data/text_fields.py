"""What stands in a dataset's file at one place: text that can be read, or a fault that names the
file and the line.
"""

import math
from collections.abc import Sequence

from finrepro.errors import EnvironmentFault

SENTIMENTS = ("negative", "neutral", "positive")  # of the sets that carry their labels by name


def decoded(content: bytes, name: str, role: str, encoding: str = "utf-8") -> str:
    """The text of a file of dataset `name`, without a byte order mark. Raises `EnvironmentFault`
    naming the line whose bytes are of another encoding.
    """
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise EnvironmentFault(
            f"{where(name, role, line)}: not {encoding.upper()} "
            f"(byte 0x{content[error.start]:02x}, {error.reason})."
        ) from None


def where(name: str, role: str, line: int | str) -> str:
    """A place in a file, as messages name it; `line` counts from 1, or says which row it is."""
    row = f"line {line}" if isinstance(line, int) else line
    return f"dataset '{name}', file '{role}', {row}"


def text_of(value: object, field: str, place: str) -> str:
    """A row's text without the white space around it.

    Raises `EnvironmentFault` for anything that is no text: null, a number, nothing but white space,
    and `nan`, as Python writes a missing value into text.
    """
    text = value.strip() if isinstance(value, str) else ""
    if text and text.lower() != "nan":
        return text
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    found = "null" if missing else "empty" if value == "" else repr(value)
    raise EnvironmentFault(f"{place}: '{field}' is {found}, expected text.")


def label_of(value: object, field: str, allowed: Sequence[str], place: str) -> str:
    """A row's label without the white space around it. Raises `EnvironmentFault` for none of those
    that are `allowed`.
    """
    label = str(value).strip()
    if label in allowed:
        return label
    raise EnvironmentFault(f"{place}: '{field}' is {value!r}, not one of {', '.join(allowed)}.")
