"""Law: without a terminal a running cell still says what it does, a line an interval, no more."""

import pytest

from finrepro.campaigns import pulse
from finrepro.campaigns.pulse import Pulse

STEP = {"event": "step", "steps": 536, "loss": 1.25, "tokens_per_second": 12345.6}


def test_a_line_an_interval_for_every_running_cell(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    said: list[str] = []
    cells = Pulse(said.append)
    cells.note("a", {"event": "phase", "phase": "data"})
    cells.note("b", {"event": "phase", "phase": "train"})
    for second in range(1, 60):
        now[0] = second
        cells.note("b", STEP | {"step": second})
        cells.beat()
    assert said == []
    now[0] = 60
    cells.note("b", STEP | {"step": 60})
    cells.beat()
    cells.beat()
    assert said == [
        "  a: data",
        "  b: step 60 of 536, loss 1.250, 12,346 tokens/s, 0:07:56 of training left",
    ]
    cells.ended("a")
    cells.note("b", {"event": "phase", "phase": "evaluate"})
    now[0] = 120
    cells.beat()
    assert said[2:] == ["  b: evaluate"]


def test_the_interval_is_a_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pulse, "INTERVAL", 0.0)
    said: list[str] = []
    cells = Pulse(said.append)
    cells.note("a", {"event": "phase", "phase": "model"})
    cells.beat()
    assert said == ["  a: model"]
