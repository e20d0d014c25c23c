"""`layout: fastest` takes what is measured to be faster, leaves nothing behind, and trains as
the layout that it took.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model import CPU, broken, make, process, random_examples, spec_of  # noqa: F401
from fixtures.process import PROGRAMS, on_ranks

from finrepro.data.batches import COLLATE
from finrepro.data.corpora.memory import TextStream
from finrepro.data.corpora.windows import Windows
from finrepro.evidence.result import header
from finrepro.running.seal import attention_used
from finrepro.training import layout as layouts
from finrepro.training.checkpoint import Control
from finrepro.training.loop import train

NAME = "gpt2_127m_mini"
FEW = {
    "max_steps": 4,
    "warmup_steps": 1,
    "global_batch_size": 6,
    "sort_window": 1,
    "max_tokens": 64,
}


def control(folder: Path, made_by: str = "") -> Control:
    return Control(lambda _: None, lambda: False, folder, made_by, checkpoint_seconds=1e9)


class Clock:
    """In place of `time`: a millisecond passes a call, and what `slowed` says. On a busy machine
    real seconds would tell nothing.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.001
        return self.now

    def slowed(self, whole: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def later(*arguments: Any) -> Any:
            self.now += seconds
            return whole(*arguments)

        return later


def settle(
    folder: Path, made_by: str = "", data: Any = None, **changes: Any
) -> tuple[Any, dict[str, Any]]:
    spec = spec_of(NAME, "lora_r8", **{**FEW, "layout": "fastest", **changes})
    examples = random_examples(0, 30) if data is None else data
    return layouts.choose_layout(spec, make(spec).model, examples, CPU, control(folder, made_by))


def takes_the_faster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "STEPS", 1)
    monkeypatch.setattr(layouts, "TURNS", 1)
    clock = Clock()
    monkeypatch.setattr(layouts, "time", clock)
    for slow, fast in (("bins", "padded"), ("padded", "bins")):
        with monkeypatch.context() as context:
            context.setitem(COLLATE, slow, clock.slowed(COLLATE[slow], 0.1))
            spec, found = settle(folder / slow)
        assert spec.train.layout == found["used"] == fast
        assert found["seconds"][slow] > 0.1 > found["seconds"][fast] > 0


def test_the_faster_layout_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    takes_the_faster(tmp_path / "ours", monkeypatch)
    monkeypatch.setattr(layouts, "MARGIN", 1e9)  # a mutant that always takes the usual one
    broken(takes_the_faster, tmp_path / "mutant", monkeypatch)


def test_within_the_margin_the_usual_layout_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for padded, used in ((1.0, "bins"), (0.96, "bins"), (0.9, "padded")):
        monkeypatch.setattr(
            layouts, "step_seconds", lambda *_, padded=padded: {"padded": padded, "bins": 1.0}
        )
        assert settle(tmp_path / str(padded))[0].train.layout == used


def test_measuring_leaves_nothing_behind() -> None:
    spec = spec_of(NAME, "full", **FEW)
    model = make(spec).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert set(layouts.step_seconds(spec, model, random_examples(0, 30), CPU)) == set(COLLATE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("adapter", ["full", "lora_r8"])
def test_a_cell_is_trained_as_with_the_layout_that_was_taken(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for used in COLLATE:
        times = {"padded": 1.0, "bins": 2.0 if used == "padded" else 0.5}
        measure = layouts.step_seconds
        monkeypatch.setattr(
            layouts,
            "step_seconds",
            lambda *a, times=times, measure=measure: {**measure(*a), **times},
        )
        losses = []
        for layout in ("fastest", used):
            spec = spec_of(NAME, adapter, **{**FEW, "layout": layout})
            model, how = make(spec).model, control(tmp_path / f"{used}-{layout}")
            spec, _ = layouts.choose_layout(spec, model, random_examples(0, 30), CPU, how)
            losses.append(
                [row["loss"] for row in train(model, random_examples(0, 30), spec, CPU, how).losses]
            )
        assert losses[0] == losses[1] and len(losses[0]) == 4


def test_an_interrupted_run_keeps_its_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "step_seconds", lambda *_: {"padded": 1.0, "bins": 2.0})
    assert settle(tmp_path, "maker")[1]["used"] == "padded"
    monkeypatch.setattr(layouts, "step_seconds", lambda *_: {"padded": 3.0, "bins": 2.0})
    assert settle(tmp_path, "maker")[1] == {
        "used": "padded",
        "seconds": {"padded": 1.0, "bins": 2.0},
    }
    assert settle(tmp_path, "another maker")[1]["used"] == "bins"
    (tmp_path / layouts.NOTE).write_text("{")
    monkeypatch.setattr(layouts, "step_seconds", lambda *_: {"padded": 1.0, "bins": 2.0})
    assert settle(tmp_path, "another maker")[1]["used"] == "padded"


def test_where_there_is_no_choice_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "step_seconds", lambda *_: pytest.fail("measured"))
    windows = Windows(TextStream([list(range(2, 200))]), 16)
    assert settle(tmp_path / "windows", data=windows)[1] == {"used": "bins", "seconds": {}}
    assert settle(tmp_path / "given", layout="padded")[1] == {"used": "padded", "seconds": {}}
    assert settle(tmp_path / "untrained", max_steps=0)[1] == {"used": None, "seconds": {}}


def test_the_record_says_which_and_what_computed_it() -> None:
    spec = spec_of(NAME, "lora_r8", **{**FEW, "layout": "fastest"})
    for used, attention in (("bins", "sdpa per segment"), ("padded", "sdpa")):
        said = {"used": used, "seconds": {"padded": 1.0, "bins": 1.0}}
        cell = header(spec, "done", None, 0.0, "cpu", said)["cell"]
        assert cell["layout"] == said
        assert attention_used(spec, "cpu", said)["train"] == attention


@pytest.mark.slow
def test_ranks_agree_on_the_slowest_ranks_time(tmp_path: Path) -> None:
    """By its own clock the second rank would pad, and the first one would not."""
    on_ranks(PROGRAMS / "layouts_program.py", tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second and first[0] == first[1]
    assert (
        first[0]["used"] == "padded"
        and first[0]["seconds"]["bins"] > 0.3 > first[0]["seconds"]["padded"] > 0.1
    )
