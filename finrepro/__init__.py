"""finrepro: the reproducibility package of a journal paper that extends FinGPT-HPC (ICDCS 2024).

`finrepro.reproduce(table=3, scale="smoke", quick=True)` and the other functions of `__all__` are
those of finrepro/api.py, which is loaded with the first of them: `import finrepro` costs nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finrepro.api import (
        budget,
        cells,
        export,
        load,
        paper,
        plan,
        record,
        reproduce,
        results,
        ui,
    )

__version__ = "0.1.0"
__all__ = [
    "budget",
    "cells",
    "export",
    "load",
    "paper",
    "plan",
    "record",
    "reproduce",
    "results",
    "ui",
]

PACKAGE = Path(__file__).resolve().parent
# configs/ and requirements/ lie at the top of a checkout, and inside an installed package.
INSTALLED = (PACKAGE / "configs").is_dir()
PROJECT = PACKAGE if INSTALLED else PACKAGE.parent


def __getattr__(name: str) -> Any:
    """The functions of the API, at their first use."""
    if name not in __all__:
        raise AttributeError(f"module 'finrepro' has no attribute '{name}'")
    from finrepro import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
