"""Every benchmark still runs: dry, as its own process, with tiny sizes and one repetition."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finrepro import PROJECT

PROGRAMS = sorted((PROJECT / "benchmarks").glob("[a-z]*.py"))  # as `invoke bench` finds them
RESULTS = PROJECT / "benchmarks" / "results"
QUICK = ("startup",)  # under 5 s of one CPU; the others load torch, most of them more than once


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("FINREPRO_")
    }
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        cwd=PROJECT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in QUICK))
        for path in PROGRAMS
    ],
)
def test_every_benchmark_runs_dry(program: Path, tmp_path: Path) -> None:
    """And leaves its JSON in the folder, with nothing among the results."""
    results = contents(RESULTS)
    process = run(program, str(tmp_path), "--dry")
    assert process.returncode == 0, process.stdout + process.stderr
    record = json.loads((tmp_path / f"{program.stem}.json").read_text())
    assert record["benchmark"] == program.stem
    assert record["dry"] is True and record["summary"]
    assert contents(RESULTS) == results


def test_the_quick_ones_exist() -> None:
    assert set(QUICK) < {path.stem for path in PROGRAMS}


@pytest.mark.parametrize("arguments", [[], [str(RESULTS)]])
def test_a_dry_run_writes_no_result(arguments: list[str]) -> None:
    results = contents(RESULTS)
    process = run(PROJECT / "benchmarks" / "startup.py", *arguments, "--dry")
    assert process.returncode == 1
    assert process.stderr == "--dry needs a folder of its own: its figures are no result.\n"
    assert contents(RESULTS) == results
