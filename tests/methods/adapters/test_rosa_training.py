"""ROSA in the training loop. The law: on every engine, at every ZeRO stage and on every number
of ranks a run is what a plain loop over dense weights gives, and an interrupted one ends bit for
bit like a whole one."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import MINIATURES, broken, process  # noqa: F401
from fixtures.process import PROGRAMS, on_ranks
from rosa_program import ENGINES, EVERY, GPT2, LLAMA, RANKED, STEPS, cell, learned, reference, run

from finrepro.errors import Interrupted
from finrepro.methods.adapters import rosa as method
from finrepro.runtime import process as runtime
from finrepro.runtime import zero3
from finrepro.training.schedule import learning_rate


@pytest.fixture(autouse=True)
def _one_thread(process: None) -> None:  # noqa: F811
    """Two threads wait for each other longer than they compute, where other processes want the
    cores as well: SVDs are small here.
    """
    torch.set_num_threads(1)


AFTER_STEP = method.after_step
BY_DEFAULT = ((LLAMA, "ddp", 0), (GPT2, "deepspeed", 2), (LLAMA, "deepspeed", 3))
RUNS = [(name, *engine) for name in MINIATURES for engine in ENGINES]
runs = pytest.mark.parametrize(
    ("name", "engine", "stage"),
    [pytest.param(*key, marks=() if key in BY_DEFAULT else pytest.mark.slow) for key in RUNS],
)


@cache
def expected(name: str) -> dict[str, Any]:
    return reference(cell(name))


def is_the_plain_loop(found: dict[str, Any], name: str) -> None:
    """S12: losses, and what each layer has learned; the rates go on as if nothing had happened
    (S5).
    """
    plain = expected(name)
    np.testing.assert_allclose(found["losses"], plain["losses"], rtol=2e-4)
    mine = learned(found["tensors"])
    assert mine.keys() == plain["learned"].keys()
    for key, value in plain["learned"].items():
        assert (mine[key] - value).norm() <= 2e-2 * value.norm(), key
    settings = cell(name).train
    assert found["rates"] == [learning_rate(step, settings) for step in range(STEPS)]


def changes_where_it_should(seen: list[Any], begun: dict[str, str]) -> None:
    """S6, S4: W_f is constant within a period and another after it; at its beginning the
    optimizer remembers nothing, then something.
    """
    before, at_first = begun, set(range(EVERY - 1, STEPS - 1, EVERY))
    for step, (now, moments) in enumerate(seen):
        for each, image in now.items():
            assert (image == before[each]) is (each.endswith("W_f") and step not in at_first), (
                each,
                step,
            )
        assert (moments == 0) is (step in at_first), step
        before = now


@runs
def test_a_run_is_the_plain_loop(name: str, engine: Any, stage: int, tmp_path: Path) -> None:
    found = run(cell(name, engine, stage), tmp_path)
    is_the_plain_loop(found, name)
    changes_where_it_should(found["seen"], found["begun"])


def keeps_the_moments(handle: Any, config: Any, step: int, max_steps: int) -> None:
    """A mutant."""
    handle.reset_state = lambda *_, **__: None
    AFTER_STEP(handle, config, step, max_steps)


def sets_the_model_alone(handle: Any, config: Any, step: int, max_steps: int) -> None:
    """A mutant: the engine's own copies of A and B are forgotten."""
    handle.set = lambda parameter, value: zero3.fill(parameter, value)
    AFTER_STEP(handle, config, step, max_steps)


def once_more(handle: Any, config: Any, step: int, max_steps: int) -> None:
    """A mutant: a period that is one step too long."""
    AFTER_STEP(handle, config, step - 1, max_steps)


@pytest.mark.parametrize(
    ("mutant", "engine", "stage"),
    [
        (keeps_the_moments, "ddp", 0),
        (once_more, "ddp", 0),
        pytest.param(sets_the_model_alone, "deepspeed", 2, marks=pytest.mark.slow),
    ],
)
def test_the_laws_find_a_resample_that_does_less(
    mutant: Any, engine: Any, stage: int, tmp_path: Path
) -> None:
    found = run(cell(LLAMA, engine, stage), tmp_path, mutant)
    broken(is_the_plain_loop, found, LLAMA)
    if engine == "ddp":
        broken(changes_where_it_should, found["seen"], found["begun"])


def ends_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """To the last bit: losses, A, B and W_f, what is exported."""
    assert (one["losses"], one["frozen"], one["scored"]) == (
        other["losses"],
        other["frozen"],
        other["scored"],
    )
    both = list(
        zip(reversed(one["seen"]), reversed(other["seen"]), strict=False)
    )  # the steps that both have made
    assert all(mine[0] == theirs[0] for mine, theirs in both)
    assert one["tensors"].keys() == other["tensors"].keys() != set()
    assert all(torch.equal(value, other["tensors"][key]) for key, value in one["tensors"].items())


def cut(spec: Any, steps: int, folder: Path) -> dict[str, Any]:
    """Stopped after so many steps, and taken up by a process with other generators."""
    seen: list[Any] = []
    with pytest.raises(Interrupted):
        run(spec, folder, stop=lambda: len(seen) >= steps, seen=seen)
    runtime.setup(123, 1)
    return run(spec, folder)


@pytest.mark.parametrize(
    ("name", "engine", "stage", "dtype", "steps"),
    [
        (GPT2, "ddp", 0, "float32", 4),  # in the middle of the second period
        (LLAMA, "ddp", 0, "bfloat16", 7),  # of the third
        *(
            pytest.param(name, *engine, dtype, steps, marks=pytest.mark.slow)
            for name, engine, dtype, steps in (
                (LLAMA, ("deepspeed", 0), "float32", 3),  # right after a resample
                (LLAMA, ("deepspeed", 1), "float32", 7),
                (LLAMA, ("deepspeed", 2), "bfloat16", 7),
                (GPT2, ("deepspeed", 3), "float32", 7),
                (GPT2, ("deepspeed", 3), "bfloat16", 4),
                (LLAMA, ("ddp", 0), "float32", 8),  # nothing is left to do
            )
        ),
    ],
)
def test_a_resumed_run_ends_bit_for_bit_like_a_whole_one(
    name: str, engine: Any, stage: int, dtype: str, steps: int, tmp_path: Path
) -> None:
    """S13."""
    spec = cell(name, engine, stage, dtype)
    whole = run(spec, tmp_path / "whole")
    assert len(set(whole["losses"])) == STEPS
    ends_alike(cut(spec, steps, tmp_path / "cut"), whole)


@pytest.mark.parametrize("forgotten", ["history", "frozen"])
def test_the_law_finds_what_a_checkpoint_forgets(
    forgotten: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, kept = run(cell(), tmp_path / "whole"), method.load_state

    def load_state(model: Any, state: Any) -> None:
        before = [zero3.whole(layer.base_layer.weight) for layer in method.layers_of(model)]
        kept(model, state)
        for layer, weight in zip(method.layers_of(model), before, strict=True):
            if forgotten == "history":
                layer.history.clear()
            else:
                zero3.fill(layer.base_layer.weight, weight)

    monkeypatch.setattr(method, "load_state", load_state)
    broken(ends_alike, cut(cell(), 7, tmp_path / "cut"), whole)


# --- two ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank, and two, have computed; `1-0`, `2-0`, `2-1`."""
    folder = tmp_path_factory.mktemp("ranks")
    for count in (1, 2):
        on_ranks(PROGRAMS / "rosa_program.py", folder, count=count)
    return {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}


def hold_the_same_bits(first: dict[str, Any], second: dict[str, Any]) -> None:
    """A, B and W_f at the beginning and after every step, and so the losses."""
    assert first["begun"] == second["begun"]
    assert [row[0] for row in first["seen"]] == [row[0] for row in second["seen"]]
    assert first["losses"] == second["losses"] and first["scored"] == second["scored"]


@pytest.mark.slow
def test_ranks_whose_svds_differ_hold_the_same_bits(found: dict[str, Any]) -> None:
    hold_the_same_bits(found["2-0"]["noisy", True], found["2-1"]["noisy", True])
    broken(hold_the_same_bits, found["2-0"]["noisy", False], found["2-1"]["noisy", False])


@pytest.mark.slow
@pytest.mark.parametrize("key", RANKED, ids=str)
def test_two_ranks_hold_the_same_bits_and_learn_what_one_does(
    key: Any, found: dict[str, Any]
) -> None:
    """S11: A, B and W_f after every step; and S12 on two ranks."""
    one, first, second = (found[rank][key] for rank in ("1-0", "2-0", "2-1"))
    hold_the_same_bits(first, second)
    assert first["begun"] == one["begun"]
    for each in (first, second):
        changes_where_it_should(each["seen"], each["begun"])
    if key[3] == "float32":
        is_the_plain_loop(one, key[0])
        is_the_plain_loop(first, key[0])
        np.testing.assert_allclose(first["scored"], one["scored"], rtol=2e-3)
    else:
        np.testing.assert_allclose(first["losses"], one["losses"], rtol=2e-2)
    assert not second["tensors"]
