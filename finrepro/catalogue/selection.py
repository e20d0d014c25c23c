"""What of a table a user asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finrepro.arguments import choice, count, seed_list
from finrepro.catalogue import reader
from finrepro.catalogue.spec import Weights
from finrepro.errors import UsageError

MAX_NAME = 100  # characters of an adapter's name: a label with it still fits a line
SCALES = ("auto", "smoke", "open", "paper")
WEIGHTS: tuple[Weights, ...] = ("pretrained", "random")


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


def select(
    table: str | int,
    *,
    quick: bool = False,
    full: bool = False,
    only: str | None = None,
    seeds: Sequence[int] | None = None,
    weights: str = "pretrained",
    devices: int | None = None,
    adapter: str | None = None,
) -> Selection:
    """A selection, checked before anything is opened. Raises `UsageError`."""
    if table == "":
        numbers = ", ".join(name.removeprefix("table") for name in reader.tables())
        raise UsageError(f"--table is needed, one of: {numbers}.")
    return Selection(
        table=str(table).removeprefix("table"),
        quick=quick,
        full=full,
        only=only,
        seeds=None if seeds is None else seed_list(seeds),
        weights=choice("weights", weights, WEIGHTS),
        world_size=None if devices is None else count("devices", devices),
        adapter=None if adapter is None else checked_folder(adapter),
    )


def checked_folder(adapter: str) -> str:
    """The folder of an adapter, whose last part becomes a name in tables, figures and MLflow.
    Raises `UsageError` for one that cannot be.
    """
    name = Path(adapter).name
    if not name or name == ".." or len(name) > MAX_NAME or not name.isprintable():
        raise UsageError(
            f"--adapter: the folder's name becomes the adapter's: {name[:MAX_NAME]!r} has to be of "
            f"1 to {MAX_NAME} printable characters; rename the folder."
        )
    return adapter
