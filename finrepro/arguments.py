"""Values of a request, checked one by one: as they were typed on a command line, or as Python gives
them. A wrong one is a line that names the option.
"""

from collections.abc import Iterable
from typing import TypeVar

from finrepro.errors import UsageError, unknown

Name = TypeVar("Name", bound=str)


def choice(option: str, value: str, allowed: tuple[Name, ...]) -> Name:
    """`value` if it is one of `allowed`, else `UsageError` with the nearest match."""
    for name in allowed:
        if value == name:
            return name
    raise unknown(f"--{option}", value, allowed)


def count(option: str, value: str | int) -> int:
    """A whole number from 1. Raises `UsageError` that names the option."""
    text = str(value)
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--{option} '{text}': expected a whole number from 1.")
    return int(text)


def positive(option: str, value: str | float, most: float = float("inf")) -> float:
    """A number above 0 and at most `most`, as 24, 0.4 or 1e9. Raises `UsageError` that names the
    option and what is allowed.
    """
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not 0 < number <= most or number == float("inf"):
        allowed = "a number above 0" + (f" and at most {most:g}" if most < float("inf") else "")
        raise UsageError(f"--{option} '{value}': expected {allowed}.")
    return number


def fraction(option: str, value: str | float) -> float:
    """A number from 0 to below 1. Raises `UsageError` that names the option."""
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not 0 <= number < 1:
        raise UsageError(f"--{option} '{value}': expected a fraction from 0 to below 1, as 0.005.")
    return number


def seed_list(value: str | Iterable[int]) -> tuple[int, ...]:
    """Seeds, typed as `0,1,2` or given as numbers. Raises `UsageError` for anything but different
    numbers from 0 to 2**32 - 1.
    """
    text = value if isinstance(value, str) else ",".join(map(str, value))
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--seeds '{text}': expected whole numbers separated by commas, as 0,1,2."
        ) from None
    if any(not 0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) != len(seeds):
        raise UsageError(
            f"--seeds '{text}': each seed is a different number from 0 to {2**32 - 1}."
        )
    return seeds
