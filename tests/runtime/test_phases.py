"""Peaks by phase: each is the largest of what was held in it, whatever the order, attempt or
rank, and the run's is the largest of them.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model import CPU, broken, make, process, random_examples, spec_of  # noqa: F401

from finrepro.errors import Interrupted
from finrepro.runtime import memory, phases, ranks
from finrepro.runtime.phases import Phases
from finrepro.training.checkpoint import Control
from finrepro.training.loop import train

MIB = 2**20
WALK = (
    ("data", 3, 1),
    ("load", 9, 8),
    ("backward", 20, 12),
    ("step", 14, 13),
    ("backward", 17, 13),
    ("step", 15, 14),
    ("save", 16, 8),
)


class Meter:
    """A counter as the kernel's: `use` moves what is held, the peak is the most since it was
    forgotten.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.peak = 0
        monkeypatch.setattr(memory, "peak_memory_bytes", lambda _: self.peak)
        monkeypatch.setattr(memory, "forget_peak_memory", self.forget)

    def forget(self, _: torch.device) -> None:
        self.peak = self.held

    def use(self, *levels: int) -> None:
        for self.held in levels:
            self.peak = max(self.peak, self.held)


def peaks_are_the_largest_levels(recorder: type[Phases], meter: Meter) -> None:
    expected: dict[str, int] = {}
    meter.use(0)
    found = recorder(CPU, WALK[0][0])
    for index, (name, *levels) in enumerate(WALK):
        if index:
            found.begin(name)
        expected[name] = max(expected.get(name, 0), meter.held, *levels)
        meter.use(*levels)
    whole = {"peak_memory_bytes": max(expected.values())}
    assert found.costs() == whole | {f"peak_{name}_bytes": peak for name, peak in expected.items()}
    assert found.costs() == found.costs()


class NeverForgets(Phases):
    def begin(self, name: str) -> None:
        self._note()
        self.name = name


class KeepsTheLast(Phases):
    def _note(self) -> None:
        self.peaks[self.name] = memory.peak_memory_bytes(self.device)


class NotesTheNext(Phases):
    def begin(self, name: str) -> None:
        self.name = name
        super().begin(name)


def test_each_phase_has_its_own_peak_and_the_run_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks_are_the_largest_levels(Phases, Meter(monkeypatch))


@pytest.mark.parametrize("mutant", [NeverForgets, KeepsTheLast, NotesTheNext])
def test_a_recorder_that_confuses_phases_is_found(
    mutant: type[Phases], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(peaks_are_the_largest_levels, mutant, Meter(monkeypatch))


def test_every_phase_is_the_largest_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, asked = Meter(monkeypatch), []
    other = {3: 30, 5: 4}  # this rank's peak -> another's
    monkeypatch.setattr(
        ranks, "largest_over_ranks", lambda mine, _: asked.append(mine) or max(mine, other[mine])
    )
    found = Phases(CPU, "load")
    meter.use(3, 0)
    found.begin("data")
    meter.use(5, 0)
    assert found.over_ranks() == found.peaks == {"load": 30, "data": 5}
    assert asked == [5, 3], "in one order on every rank: that of the names"


def test_the_process_s_own_memory_falls_into_the_phase_that_holds_it() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel's mark cannot be reset here")
    found = Phases(CPU, "before")
    found.begin("large")
    block = torch.ones(64 * MIB // 4)  # larger than what glibc keeps when it is freed
    del block
    found.begin("after")
    costs = found.costs()
    assert costs["peak_memory_bytes"] == costs["peak_large_bytes"]
    assert all(
        costs["peak_large_bytes"] - costs[f"peak_{name}_bytes"] > 48 * MIB
        for name in ("before", "after")
    )


def attempt(folder: Path, recorder: Phases, steps: int, stop_after: int | None = None) -> None:
    """Train a tiny model as a run does, to its end or until it is stopped."""
    spec = spec_of(
        "gpt2_127m_mini",
        "lora_r8",
        max_steps=steps,
        global_batch_size=4,
        engine="ddp",
        sort_window=1,
    )
    recorder.begin("load")
    built, seen = make(spec), []
    stop: Callable[[], bool] = lambda: stop_after is not None and len(seen) >= stop_after  # noqa: E731
    control = Control(seen.append, stop, folder, checkpoint_seconds=1e9, phases=recorder)
    train(built.model, random_examples(0, 12), spec, CPU, control)


def test_a_step_is_backward_and_then_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    whole = Phases.begin
    monkeypatch.setattr(Phases, "begin", lambda self, name: begun.append(name) or whole(self, name))
    with pytest.raises(Interrupted):
        attempt(tmp_path, Phases(CPU), steps=4, stop_after=2)
    assert begun == ["load", *["backward", "step"] * 2, "save"]
    begun.clear()
    attempt(tmp_path, Phases(CPU), steps=4)
    assert begun == ["load", *["backward", "step"] * 2]


def an_attempt_s_peaks_outlive_it(
    recorder: type[Phases], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt needs more than the second in every phase; no phase of the run is
    smaller afterwards.
    """
    level = itertools.count(1000, -1)
    monkeypatch.setattr(memory, "forget_peak_memory", lambda _: None)
    monkeypatch.setattr(memory, "peak_memory_bytes", lambda _: next(level))
    first, second = recorder(CPU), recorder(CPU)
    with pytest.raises(Interrupted):
        attempt(folder, first, steps=2, stop_after=2)
    at_save = dict(first.peaks)
    assert set(at_save) == {"data", "load", "backward", "step", "save"}
    attempt(folder, second, steps=2)  # nothing is left to do: its phases are those of the first
    assert second.costs() == {"peak_memory_bytes": 1000} | {
        f"peak_{name}_bytes": at_save[name] for name in at_save
    }


class ForgetsTheAttempt(Phases):
    def over_ranks(self) -> dict[str, int]:
        super().over_ranks()
        return {}


def test_a_resumed_run_has_the_peaks_of_all_its_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_attempt_s_peaks_outlive_it(Phases, tmp_path / "whole", monkeypatch)
    broken(an_attempt_s_peaks_outlive_it, ForgetsTheAttempt, tmp_path / "lost", monkeypatch)


def test_training_without_a_recorder_of_its_own_keeps_one(tmp_path: Path) -> None:
    control: Any = Control(lambda _: None, lambda: False, tmp_path)
    assert isinstance(control.phases, phases.Phases) and control.phases.device == CPU
