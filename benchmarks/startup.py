"""How long a user waits before anything happens: `invoke --list` and `invoke cells`, against an
interpreter that does nothing.

    python benchmarks/startup.py [FOLDER] [BASELINE] [--dry]

With BASELINE, another checkout of the project, its commands run in the same rounds.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from _measure import ARGUMENTS, interleaved, sized, write

from finrepro import PROJECT

REPEATS = sized(9, 1)


def run(command: list[str], checkout: Path) -> None:
    """A whole process, in the checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)


def main() -> None:
    """Whole processes, in turn."""
    checkouts = {"": PROJECT}
    if len(ARGUMENTS) > 1:
        checkouts["baseline_"] = Path(ARGUMENTS[1]).resolve()
    with tempfile.TemporaryDirectory() as store:
        runs: dict[str, Callable[[], object]] = {
            "python": partial(run, [sys.executable, "-c", "pass"], PROJECT)
        }
        for prefix, checkout in checkouts.items():
            for name, command in (("list", ["--list"]), ("cells", ["cells", "--store", store])):
                arguments = [sys.executable, "-m", "invoke", *command]
                runs[f"{prefix}invoke_{name}"] = partial(run, arguments, checkout)
        seconds = interleaved(runs, REPEATS)
    summary = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    write(
        "startup",
        {"seconds": seconds, "summary": {name: round(value, 3) for name, value in summary.items()}},
    )


if __name__ == "__main__":
    main()
