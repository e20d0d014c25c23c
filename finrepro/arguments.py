"""Values of a request, checked one by one: as they were typed on a command line, or as Python gives
them. A wrong one is a line that names the option.
"""

import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from finrepro.errors import UsageError, unknown

Name = TypeVar("Name", bound=str)
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
# What file systems allow is 255; partial files beside it and tables named after it need a part.
NAME_BYTES = 200
LARGEST = {"mfu": 1.0, "hours": 1e7, "tokens": 1e18, "unique-tokens": 1e18}


def checked(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """`function`, with its texts checked before anything else is done with them."""

    @wraps(function)
    def call(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Answer:
        check_texts(signature(function).bind(*arguments, **keywords).arguments)
        return function(*arguments, **keywords)

    return call


def check_texts(options: Mapping[str, object]) -> None:
    """Raise `UsageError` for an option, or a variable of ours, that can be no name of a file or be
    printed in no line.
    """
    variables = {name: text for name, text in os.environ.items() if name.startswith("FINREPRO_")}
    flags = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    for name, value in {**variables, **flags}.items():
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str):
            continue
        shown = ascii(text if len(text) < 60 else text[:60] + "...")
        if any("\udc80" <= letter <= "\udcff" for letter in text):
            raise UsageError(f"{name} {shown}: its bytes are no UTF-8.")
        if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in text):
            raise UsageError(f"{name} {shown}: control characters and line breaks are not allowed.")
        if max(len(part.encode()) for part in text.split("/")) > NAME_BYTES:
            raise UsageError(f"{name} {shown}: a name may have {NAME_BYTES} bytes at most.")


def needed(value: object, message: str) -> None:
    """Raise `UsageError` for a value that is empty."""
    if not value:
        raise UsageError(f"{message}.")


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


def optional_count(option: str, value: str | int | None) -> int | None:
    """As `count`; None stays None."""
    return None if value is None else count(option, value)


def positive(option: str, value: str | float) -> float:
    """A number above 0 and at most `LARGEST`, as 24, 0.4 or 1e9. Raises `UsageError` that names the
    option and what is allowed.
    """
    most = LARGEST.get(option, float("inf"))
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
