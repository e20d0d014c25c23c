"""`invoke bench` starts every benchmark, or one, with the folder of its JSON."""

from pathlib import Path
from typing import Any

import pytest

from finrepro import PROJECT
from finrepro.commands import develop
from finrepro.errors import UsageError

FOLDER = PROJECT / "benchmarks"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of the processes that were to be started; the second of them fails."""
    commands: list[list[str]] = []

    def call(command: list[str], **_: Any) -> int:
        commands.append(command[1:])
        return int(len(commands) == 2)

    monkeypatch.setattr("finrepro.commands.develop.subprocess.call", call)
    return commands


def test_every_benchmark_is_started_also_after_one_has_failed(
    started: list[list[str]], tmp_path: Path
) -> None:
    assert develop.run_benchmarks("", tmp_path / "store") == 4
    programs = sorted(FOLDER.glob("[!_]*.py"))
    assert started == [[str(path), str(tmp_path / "store")] for path in programs]
    assert (tmp_path / "store").is_dir()


def test_one_benchmark_is_started_by_its_name(started: list[list[str]]) -> None:
    assert develop.run_benchmarks("startup", None) == 0
    assert started == [[str(FOLDER / "startup.py"), str(FOLDER / "results")]]


def test_an_unknown_benchmark_is_refused(started: list[list[str]]) -> None:
    with pytest.raises(UsageError, match="startup"):
        develop.run_benchmarks("startupp", None)
    assert not started
