"""The timing that every benchmark shares."""

import importlib.util
import sys
from types import ModuleType

import pytest

from finrepro import PROJECT


def measure(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ModuleType:
    """The module, as a benchmark with these arguments has it."""
    path = PROJECT / "benchmarks" / "_measure.py"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    specification = importlib.util.spec_from_file_location("measure_of_a_test", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("arguments", "warm_up"), [([], 1), (["folder", "--dry"], 0)])
def test_candidates_run_in_turn_after_a_warm_up(
    arguments: list[str], warm_up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    # The clock of each round: the slow candidate takes 3 and the fast one 1.
    now = 0.0

    def run(name: str, seconds: float) -> None:
        nonlocal now
        runs.append(name)
        now += seconds

    seconds = measure(monkeypatch, *arguments).interleaved(
        {"slow": lambda: run("slow", 3.0), "fast": lambda: run("fast", 1.0)}, 2, lambda: now
    )
    assert runs == ["slow", "fast"] * (warm_up + 2)
    assert seconds == {"slow": [3.0, 3.0], "fast": [1.0, 1.0]}


def test_ratios_are_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = measure(monkeypatch).ratios([2.0, 6.0, 4.0], [1.0, 1.0, 1.0])
    assert ratios == {"median": 4.0, "min": 2.0, "max": 6.0}


def test_sizes_are_tiny_in_a_dry_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(monkeypatch).sized(1024, 8) == 1024
    assert measure(monkeypatch, "folder", "--dry").sized(1024, 8) == 8
