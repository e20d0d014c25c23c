"""Every scoring of a split, noted before it happens: an attempt that failed or was thrown away
still counts, so that tuning on a test set shows.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finrepro import bounds, strict_json
from finrepro.catalogue.spec import RunSpec
from finrepro.evidence.files import disk_errors
from finrepro.evidence.sealed import SEAL, sealed, unsealed


@dataclass(frozen=True)
class Scorings:
    """The file of a store: a sealed line a scoring. Older lines have no seal."""

    path: Path

    def note(self, spec: RunSpec, task: str) -> None:
        """Note that a task's split is scored."""
        row = {
            "run_id": spec.run_id,
            "label": spec.label,
            "task": task,
            "split": spec.evaluation.split,
            "time": time.time(),
        }
        with (
            disk_errors(self.path.parent.parent),
            self.path.open("a", encoding="utf-8") as file,
        ):
            file.write("\n" + strict_json.dumps(sealed(row)))

    def times(self, spec: RunSpec) -> int:
        """How often this configuration's split has been scored."""
        return sum(row["run_id"] == spec.run_id for row in self._read()[0])

    def damaged(self) -> int:
        """Lines that are not what was written, or were cut off by a crash."""
        return self._read()[1]

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return [], 0
        lines = [line for line in text.split("\n") if line]
        rows = [row for row in map(_row, lines) if row is not None]
        return rows, len(lines) - len(rows)


def _row(line: str) -> dict[str, Any] | None:
    try:
        content = bounds.loads(line)
    except ValueError:
        return None
    row = unsealed(content) if isinstance(content, dict) and SEAL in content else content
    return row if isinstance(row, dict) and "run_id" in row else None
