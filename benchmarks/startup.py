"""How long a user waits before anything happens: `invoke --list` and `invoke cells`, against an
interpreter that does nothing.
"""

import subprocess
import sys
import tempfile

from _measure import interleaved, write

from finrepro import PROJECT

REPEATS = 9


def main() -> None:
    """Whole processes, in turn."""
    with tempfile.TemporaryDirectory() as store:
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "invoke_list": [sys.executable, "-m", "invoke", "--list"],
            "invoke_cells": [sys.executable, "-m", "invoke", "cells", "--store", store],
        }
        runs = {
            name: (
                lambda command=command: subprocess.run(
                    command, cwd=PROJECT, check=True, capture_output=True
                )
            )
            for name, command in commands.items()
        }
        seconds = interleaved(runs, REPEATS)
    summary = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    write(
        "startup",
        {"seconds": seconds, "summary": {name: round(value, 3) for name, value in summary.items()}},
    )


if __name__ == "__main__":
    main()
