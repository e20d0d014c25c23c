"""What of a table a user asks for, and how it is said on the command line."""

from dataclasses import dataclass
from typing import Any

from finrepro.catalogue.spec import Weights
from finrepro.errors import UsageError, unknown

SCALES = ("auto", "smoke", "paper")
WEIGHTS = ("pretrained", "random")


@dataclass(frozen=True)
class Selection:
    """What of a table is asked for. `seeds`, `only` and `adapter` (a PEFT folder) narrow or
    replace; `world_size` is devices per cell, None where the table decides."""

    table: str
    quick: bool = False
    full: bool = False
    only: str | None = None
    seeds: tuple[int, ...] | None = None
    weights: Weights = "pretrained"
    world_size: int | None = None
    adapter: str | None = None


def parse_seeds(text: str | None) -> tuple[int, ...] | None:
    """`0,1,2` as numbers. Raises `UsageError` on anything else."""
    if text is None:
        return None
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


def parse_choice(name: str, value: str, allowed: tuple[str, ...]) -> Any:
    """`value` if it is one of `allowed`, else `UsageError` with the nearest match."""
    if value not in allowed:
        raise unknown(f"--{name}", value, allowed)
    return value
