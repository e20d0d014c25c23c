"""Small JSON files that carry their own sha256, so that a changed byte shows when they are read."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finrepro import bounds, strict_json
from finrepro.evidence.manifest import Damaged

SEAL = "sha256"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with its seal, ready to be written as JSON."""
    return {**value, SEAL: _digest(value)}


def unsealed(content: Any) -> dict[str, Any] | None:
    """What was sealed; None where it, or its seal, is another by now."""
    if not isinstance(content, dict) or SEAL not in content:
        return None
    value = {key: item for key, item in content.items() if key != SEAL}
    return value if content[SEAL] == _digest(value) else None


def read_sealed(path: Path, older: bool = False) -> dict[str, Any] | None:
    """What was sealed in a file; None where there is none. Raises `Damaged` with the file's name if
    it is not what was written. With `older`, a JSON object without a seal is taken as it is.
    """
    try:
        content = bounds.read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise Damaged(path.name) from None
    if older and isinstance(content, dict) and SEAL not in content:
        return content
    value = unsealed(content)
    if value is None:
        raise Damaged(path.name)
    return value


def _digest(value: Mapping[str, Any]) -> str:
    text = strict_json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
