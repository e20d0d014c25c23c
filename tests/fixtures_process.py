"""Running the project as a process of its own, and making the catalogue forget what it has read."""

import os
import subprocess
import sys
from pathlib import Path

from finrepro import PROJECT
from finrepro.catalogue import cells, reader
from finrepro.errors import FinreproError

CACHED = [each for module in (reader, cells) for each in vars(module).values() if hasattr(each, "cache_clear")]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without the user's own settings: no store, data or token is found by accident, no hub is asked."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FINREPRO_", "HF_", "INVOKE_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"} | extra


def python(*arguments: str, cwd: Path = PROJECT, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter on the project, as a process of its own."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=120)


def one_line(error: FinreproError) -> str:
    """The message of an error, which has to be one readable line."""
    text = str(error)
    assert text.strip() and "\n" not in text and "Traceback" not in text, text
    return text


def forget() -> None:
    """Make the catalogue read its files again."""
    for function in CACHED:
        function.cache_clear()
