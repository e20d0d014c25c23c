"""JSON that every reader can read: no NaN and no infinity, neither written nor read.

Python's own module writes and reads `NaN` and `Infinity`, which are no JSON (RFC 8259, section 6):
other programs refuse such a file, and a score that is no number would look like one.
"""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """As `json.dumps`. Raises `ValueError` for a number that is not finite."""
    return json.dumps(value, allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """As `json.loads`. Raises `ValueError` for NaN, for infinity, and for a number as 1e999, which
    would become one.
    """
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)
