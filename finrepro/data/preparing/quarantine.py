"""What could not be read, counted and listed with file, line and reason; or the first of it as
the error that stops.
"""

import contextlib
import json
from collections import Counter
from pathlib import Path

from finrepro.errors import EnvironmentFault, unknown

NAME = "quarantine.jsonl"
CHOICES = ("stop", "skip")


def check_choice(choice: str) -> None:
    """Raises `UsageError` unless the choice is one."""
    if choice not in CHOICES:
        raise unknown("choice for --on-error", choice, CHOICES)


class Quarantine:
    """Gathers faults into `quarantine.jsonl` of the corpus, which is there only when it has a
    line. `choice` is stop or skip.
    """

    def __init__(self, folder: Path, choice: str) -> None:
        self.path, self.stops = folder / NAME, choice == "stop"
        self._partial = folder / f".{NAME}.partial"
        self._file = None if self.stops else self._partial.open("w", encoding="utf-8")
        self.count = 0
        self.reasons: Counter[str] = Counter()

    def fault(self, file: str, line: int, reason: str) -> None:
        """One fault. Raises `EnvironmentFault` with it when faults stop."""
        if self._file is None:
            where = f"{file}, line {line}" if line else file
            raise EnvironmentFault(
                f"{where}: {reason}. Give --on-error skip to set such documents aside."
            )
        self.count += 1
        self.reasons[reason.split(" (")[0]] += 1
        row = {"file": file, "line": line, "reason": reason}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self, whole: bool) -> None:
        """Keep the list, if the preparation has come to its end."""
        if self._file is not None:
            with contextlib.nullcontext() if whole else contextlib.suppress(OSError):
                self._file.close()
        if whole and self.count:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)
            if whole:
                self.path.unlink(missing_ok=True)
