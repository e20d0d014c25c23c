"""Where a cell works: its store, and where data and weights may be found."""

from dataclasses import dataclass
from pathlib import Path

from finrepro.evidence.store import Store


@dataclass(frozen=True)
class Place:
    """Folders on this machine. They are no part of a cell: the same cell in another place is the
    same cell.
    """

    store: Store
    data_dir: Path | None = None
    models_dir: Path | None = None
