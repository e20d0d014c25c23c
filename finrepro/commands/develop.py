"""What the commands for developers do: tests, checks and benchmarks, each a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from finrepro import PROJECT
from finrepro.errors import EnvironmentFault, UsageError, unknown

CHECKS = (("ruff", "format", "--check"), ("ruff", "check"), ("mypy",), ("lint-imports",))


def run_tests(slow: bool, only: str, quick: bool = False) -> int:
    """pytest over the default, the slow or the quick tests, a process a core and four at most; its
    exit status. Raises `UsageError` where both kinds are asked for.

    The quick ones are those that tests/quick.txt names, a file or a test a line.
    """
    if quick and slow:
        raise UsageError("--quick and --slow are different tests: take one of them.")
    marks = f"{'' if slow else 'not '}slow and not container and not gpu"
    workers = ["-n", str(min(4, len(os.sched_getaffinity(0)))), "--dist", "worksteal"]
    options = ["-m", marks, *(["-k", only] if only else workers)]
    _needs_checkout("tests")
    paths = ["@tests/quick.txt"] if quick else []
    return subprocess.call([sys.executable, "-m", "pytest", *options, *paths], cwd=PROJECT)


def run_checks() -> int:
    """Every check, also after one has failed. Raises `EnvironmentFault` where the tools are not
    installed.
    """
    folder = Path(sys.executable).parent
    _needs_checkout("pyproject.toml")
    absent = [tool for tool, *_ in CHECKS if not (folder / tool).is_file()]
    if absent:
        raise EnvironmentFault(
            f"{absent[0]} is not installed: ./run check installs it, in a checkout."
        )
    codes = [
        subprocess.call([str(folder / tool), *options], cwd=PROJECT) for tool, *options in CHECKS
    ]
    return 4 if any(codes) else 0


def run_benchmarks(only: str, folder: Path | None) -> int:
    """Every benchmark, or one, with its JSON in `folder`. Raises `UsageError` for a name that is
    none of them.
    """
    _needs_checkout("benchmarks")
    files = {path.stem: path for path in sorted((PROJECT / "benchmarks").glob("[a-z]*.py"))}
    if only and only not in files:
        raise unknown("benchmark", only, files)
    target = folder or PROJECT / "benchmarks" / "results"
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{target} cannot be made ({error.strerror}); choose another with --store."
        ) from None
    programs = [files[only]] if only else list(files.values())
    codes = [
        subprocess.call([sys.executable, str(path), str(target)], cwd=PROJECT) for path in programs
    ]
    return 4 if any(codes) else 0


def _needs_checkout(name: str) -> None:
    """Raise `EnvironmentFault` where the package is installed, or in an image, without `name`."""
    if not (PROJECT / name).exists():
        raise EnvironmentFault(
            f"{name} is not here: run this command in a clone of the repository."
        )
