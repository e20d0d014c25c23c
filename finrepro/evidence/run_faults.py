"""Whether a run's folder is what was sealed: its files by their digests, and folder, id and spec by
one another.
"""

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finrepro import strict_json
from finrepro.evidence import schema
from finrepro.evidence.manifest import damaged_files, file_digest

RESULT, WEIGHTS = "result.json", "weights/"


def run_faults(
    folder: Path, digest: Callable[[Path], str] = file_digest, weights: bool = True
) -> list[str]:
    """What of a run is not what was sealed, as `read_run` says it."""
    return read_run(folder, digest, weights)[1]


def read_run(
    folder: Path, digest: Callable[[Path], str] = file_digest, weights: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """A run's result, and what of the run is not what was sealed: the name of a file or a sentence
    each. The result is to be used only where there is no such fault.

    `digest` gives a file's sha256; without `weights` those are not read. Raises `EnvironmentFault`
    for a result of another format.
    """
    if not stat.S_ISDIR(folder.lstat().st_mode):
        return {}, [f"{folder.name} is no folder of its own"]
    faults = damaged_files(folder, digest, lambda name: weights or not name.startswith(WEIGHTS))
    if faults:
        return {}, faults
    result, fault = schema.examine(folder / RESULT)
    if fault:
        return result, [f"{RESULT} holds no result ({fault})"]
    return result, _identity_faults(folder, result)


def _identity_faults(folder: Path, result: dict[str, Any]) -> list[str]:
    """Where the folder's name, the id and the spec of its result disagree: a run that was copied
    under another id, or whose settings were edited and sealed again.
    """
    if result["run_id"] != folder.name:
        return [f"{RESULT} is that of run {result['run_id']}"]
    made = spec_id(result["spec"])
    return [] if made == folder.name else [f"{RESULT} has the spec of run {made}"]


def spec_id(spec: Any) -> str:
    """The id of the run that a recorded spec is of, as `RunSpec.run_id` computes it."""
    text = strict_json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
