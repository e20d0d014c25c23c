"""What a command was asked for, as checked values: a wrong option is one line before anything is
opened.
"""

from finrepro.catalogue import reader
from finrepro.catalogue.selection import WEIGHTS, Selection, parse_choice, parse_seeds
from finrepro.errors import UsageError


def selection(
    table: str,
    quick: bool,
    full: bool,
    only: str | None,
    seeds: str | None,
    weights: str,
    devices: str | None,
    adapter: str | None,
) -> Selection:
    """The part of a table that is asked for. Raises `UsageError`."""
    if not table:
        known = ", ".join(name.removeprefix("table") for name in reader.tables())
        raise UsageError(f"--table is needed, one of: {known}.")
    return Selection(
        table=table.removeprefix("table"),
        quick=quick,
        full=full,
        only=only,
        seeds=parse_seeds(seeds),
        weights=parse_choice("weights", weights, WEIGHTS),
        world_size=None if devices is None else whole("devices", devices),
        adapter=adapter,
    )


def whole(name: str, text: str) -> int:
    """A whole number from 1. Raises `UsageError` that names the option."""
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--{name} '{text}': expected a whole number from 1.")
    return int(text)


def number(name: str, text: str, most: float = float("inf")) -> float:
    """A number above 0 and at most `most`, as 24, 0.4 or 1e9. Raises `UsageError` that names the
    option and what is allowed.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value <= most or value == float("inf"):
        allowed = "a number above 0" + (f" and at most {most:g}" if most < float("inf") else "")
        raise UsageError(f"--{name} '{text}': expected {allowed}.")
    return value
