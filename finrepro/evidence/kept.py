"""Runs that are kept beside the one of their id: what was replaced, damaged, or did not finish."""

import os
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any


def beside(folder: Path, run_id: str, result: Mapping[str, Any]) -> Path:
    """A new name in `folder`, which is made, for a run with this result; {} where it has none."""
    folder.mkdir(exist_ok=True)
    name = f"{run_id}-{int(result.get('ended', time.time()))}"
    numbered = (folder / (name + (f"-{number}" if number else "")) for number in count())
    return next(path for path in numbered if not os.path.lexists(path))


def kept(folder: Path, run_id: str) -> list[Path]:
    """What `beside` has named for a run."""
    return sorted(folder.glob(f"{run_id}-*"))
