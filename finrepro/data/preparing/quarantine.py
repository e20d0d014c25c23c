"""Damaged documents: a list with file, line and reason, or the first one as an error."""

import contextlib
from collections import Counter
from pathlib import Path

from finrepro import strict_json
from finrepro.errors import EnvironmentFault, unknown

NAME = "quarantine.jsonl"
CHOICES = ("stop", "skip")


def check_choice(choice: str) -> None:
    """Raise `UsageError` for an unknown choice."""
    if choice not in CHOICES:
        raise unknown("choice for --on-error", choice, CHOICES)


class Quarantine:
    """Collects faults in `quarantine.jsonl` of the corpus, which is there only where there are any.
    `choice` is stop or skip.
    """

    def __init__(self, folder: Path, choice: str) -> None:
        self.path, self.stops = folder / NAME, choice == "stop"
        self._partial = folder / f".{NAME}.partial"
        self._file = None if self.stops else self._partial.open("w", encoding="utf-8")
        self.count = 0
        self.reasons: Counter[str] = Counter()

    def fault(self, file: str, line: int, reason: str) -> None:
        """Record a fault. Raises it as `EnvironmentFault` where the choice is to stop."""
        if self._file is None:
            where = f"{file}, line {line}" if line else file
            raise EnvironmentFault(
                f"{where}: {reason}. Give --on-error skip to set such documents aside."
            )
        self.count += 1
        self.reasons[reason.split(" (")[0]] += 1
        row = {"file": file, "line": line, "reason": reason}
        self._file.write(strict_json.dumps(row, ensure_ascii=False) + "\n")

    def close(self, finished: bool) -> None:
        """Give the list its name if the preparation is finished, else remove it."""
        if self._file is not None:
            with contextlib.nullcontext() if finished else contextlib.suppress(OSError):
                self._file.close()
        if finished and self.count:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)
            if finished:
                self.path.unlink(missing_ok=True)
