"""The hooks of the training loop. The law: what an adapter reads and sets around a step is what
a plain torch loop reads and sets, on every engine and at every ZeRO stage, and still is steps
later: an engine writes the weights from copies of its own, so one step proves nothing."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import CPU, broken, make, process, random_examples, spec_of, tiny  # noqa: F401
from fixtures.planted import plant
from fixtures.process import PROGRAMS, on_ranks
from steps_program import (
    ENGINES,
    MATRIX,
    NAME,
    SCALAR,
    STEPS,
    Method,
    control,
    hooked,
    reference,
    run,
    spec,
    trained_of,
)
from torch import Tensor, nn

from finrepro.errors import Interrupted
from finrepro.methods.adapters import full
from finrepro.runtime import process as runtime
from finrepro.runtime import zero3
from finrepro.training.engine_view import EngineView
from finrepro.training.loop import train

FEWER = (("ddp", 0), ("deepspeed", 3))
engines = pytest.mark.parametrize(
    ("engine", "stage"),
    [pytest.param(*key, marks=() if key in FEWER else pytest.mark.slow) for key in ENGINES],
)


@cache
def expected() -> dict[str, Any]:
    """The loop by hand."""
    return reference()


def agree(found: dict[str, Any]) -> None:
    """Losses, what was read around every step, and the weights at the end are those of the plain
    loop.
    """
    plain = expected()
    np.testing.assert_allclose(found["losses"], plain["losses"], rtol=1e-5)
    assert [row[0] for row in found["seen"]] == list(range(STEPS))
    for mine, theirs in zip(found["seen"], plain["seen"], strict=True):
        for what, value, right in zip(
            ("gradient", "scalar's gradient", "matrix", "scalar", "frozen"),
            mine[1:],
            theirs[1:],
            strict=True,
        ):
            assert value.shape == right.shape and value.dtype == right.dtype
            # In norm: where a gradient is all but zero, Adam turns rounding into a step of either
            # sign.
            assert (value - right).norm() <= 2e-3 * right.norm(), f"{what}, step {mine[0]}"
    for name, value in found["weights"].items():
        if value.numel():  # at ZeRO-3 they are collected on the first of several ranks
            assert (value - plain["weights"][name]).norm() <= 1e-3 * plain["weights"][
                name
            ].norm(), name


@engines
def test_the_hooks_read_and_set_what_a_plain_loop_does(
    engine: Any, stage: int, tmp_path: Path
) -> None:
    agree(run(spec(engine, stage), tmp_path))


class OnlyTheModel(Method):
    """Mutant: a weight edited where the model has it, not where the optimizer does."""

    def after_step(self, view: EngineView, config: Any, step: int, max_steps: int) -> None:
        view.set = lambda parameter, value: zero3.fill(parameter, value)  # type: ignore[method-assign]
        super().after_step(view, config, step, max_steps)


class MomentsStay(Method):
    """Mutant: nothing is reset."""

    def after_step(self, view: EngineView, config: Any, step: int, max_steps: int) -> None:
        view.reset_state = lambda *_, **__: None  # type: ignore[method-assign]
        super().after_step(view, config, step, max_steps)


class StepsStay(Method):
    """Mutant: the moments are reset, the counts of steps are not."""

    def after_step(self, view: EngineView, config: Any, step: int, max_steps: int) -> None:
        kept = view.reset_state
        view.reset_state = lambda *given, **__: kept(*given, steps=False)  # type: ignore[method-assign]
        super().after_step(view, config, step, max_steps)
        view.reset_state = kept  # type: ignore[method-assign]


class TwiceTheLoss(Method):
    """Mutant: the extra loss is counted twice, as by a loop that adds it in two micro-batches or
    on two ranks.
    """

    def extra_loss(self, model: nn.Module, config: Any) -> Tensor:
        return 2 * super().extra_loss(model, config)


MUTANTS = (OnlyTheModel, MomentsStay, StepsStay, TwiceTheLoss)
SEEN_BY_DEFAULT = ((OnlyTheModel, 3), (MomentsStay, None), (StepsStay, None), (TwiceTheLoss, None))


@pytest.mark.parametrize(
    ("mutant", "stage"),
    [
        pytest.param(
            mutant, stage, marks=() if (mutant, stage) in SEEN_BY_DEFAULT else pytest.mark.slow
        )
        for mutant in MUTANTS
        for stage in (
            (1, 2, 3) if mutant is OnlyTheModel else (None, 2)
        )  # torch alone steps the model's own weights
    ],
)
def test_the_law_finds_what_is_set_in_the_wrong_place_or_counted_wrongly(
    mutant: type[Method], stage: int | None, tmp_path: Path
) -> None:
    broken(agree, run(spec() if stage is None else spec("deepspeed", stage), tmp_path, mutant()))


def test_the_extra_loss_is_in_no_recorded_loss_and_moves_the_weights(tmp_path: Path) -> None:
    class Constant:
        def extra_loss(self, model: nn.Module, config: Any) -> Tensor:  # noqa: ARG002
            return 1e3 + 0 * next(iter(trained_of(model).values())).sum()

    few = {"max_steps": 3}
    losses = [row["loss"] for row in _train(spec(**few), tmp_path / "none").losses]
    with hooked(Constant()):
        assert [row["loss"] for row in _train(spec(**few), tmp_path / "constant").losses] == losses


def _train(cell: Any, folder: Path) -> Any:
    return train(make(cell).model, random_examples(0, 30), cell, CPU, control(folder))


def same_bits(mine: dict[str, Any], whole: dict[str, Any]) -> None:
    """Losses and weights."""
    assert mine["losses"] == whole["losses"]
    assert all(
        torch.equal(value, whole["weights"][name]) for name, value in mine["weights"].items()
    )


def interrupted(
    engine: Any, stage: int, folder: Path, method: type[Method] = Method
) -> dict[str, Any]:
    """Stopped after three steps, and resumed by another process's generators."""
    seen: list[Any] = []
    with pytest.raises(Interrupted):
        run(spec(engine, stage), folder, method(), stop=lambda: len(seen) >= 3, seen=seen)
    runtime.setup(123, 2)
    return run(spec(engine, stage), folder, method())


@pytest.mark.parametrize(
    ("engine", "stage"),
    [
        ("ddp", 0),
        *(pytest.param("deepspeed", stage, marks=pytest.mark.slow) for stage in (0, 2, 3)),
    ],
)
def test_a_resumed_run_takes_up_what_the_method_kept(
    engine: Any, stage: int, tmp_path: Path
) -> None:
    whole = run(spec(engine, stage), tmp_path / "whole")
    same_bits(interrupted(engine, stage, tmp_path / "cut"), whole)


@pytest.mark.parametrize("forgotten", ["average", pytest.param("frozen", marks=pytest.mark.slow)])
def test_the_law_finds_a_resumed_run_that_has_forgotten_something(
    forgotten: str, tmp_path: Path
) -> None:
    class Forgets(Method):
        def load_state(self, model: Any, state: dict[str, Any]) -> None:
            super().load_state(model, state)
            if forgotten == "average":
                model.average = torch.zeros_like(model.average)
            else:
                zero3.fill(
                    model.get_parameter("model.layers.0.mlp.up_proj.base_layer.weight"),
                    state["frozen"] / 0.9,
                )

    whole = run(spec(), tmp_path / "whole")
    broken(same_bits, interrupted("ddp", 0, tmp_path / "cut", Forgets), whole)


def test_what_a_handle_refuses(tmp_path: Path) -> None:
    """By name, and in a line."""
    refused: list[str] = []

    class Wrong:
        def before_step(self, view: EngineView, step: int, max_steps: int) -> None:  # noqa: ARG002
            view.gradient(view.trained[MATRIX])

        def after_step(self, view: EngineView, step: int, max_steps: int) -> None:  # noqa: ARG002
            matrix, scalar = view.trained[MATRIX], view.trained[SCALAR]
            base = view.model.get_parameter("model.norm.weight")
            for error, wrong in (
                (RuntimeError, lambda: view.gradient(matrix)),
                (ValueError, lambda: view.set(matrix, torch.zeros(2))),
                (ValueError, lambda: view.set(base, view.whole(base))),
                (ValueError, lambda: view.set_frozen(matrix, view.value(matrix))),
                (
                    ValueError,
                    lambda: view.reset_state([matrix, scalar]),
                ),  # one count for a whole group
                (ValueError, lambda: view.value(base)),
            ):
                with pytest.raises(error) as caught:
                    wrong()
                refused.append(str(caught.value))

    for key in (("ddp", 0), ("deepspeed", 2)):
        with hooked(Wrong()):
            _train(spec(*key, max_steps=1), tmp_path / str(key))
    assert refused[:6] == refused[6:] and all("\n" not in each for each in refused)
    assert "before_step only" in refused[0] and "has to be reset as well" in refused[4]


# --- bfloat16 weights, which the optimizer keeps in float32


def bf16_values(
    stage: int, folder: Path, monkeypatch: pytest.MonkeyPatch, setter: Any = EngineView.set
) -> None:
    """A value with more digits than bfloat16 has is there after it was set, at the next step,
    and all but the same after that; the model's weight is that value rounded."""
    model = dataclasses.replace(tiny(NAME), dtype="bfloat16")
    cell = spec_of(
        model,
        "full",
        "none",
        zero_stage=stage,
        max_steps=5,
        warmup_steps=0,
        global_batch_size=6,
        lr=1e-4,
    )
    name, value = "model.layers.1.mlp.up_proj.weight", torch.full((128, 64), 1 / 3)
    seen: list[Tensor] = []
    where = {}

    def before(view: EngineView, config: Any, step: int, max_steps: int) -> None:
        where[step] = view.value(view.trained[name])
        gradient = view.gradient(view.trained[name])
        assert gradient.dtype == torch.float32 and gradient.norm() > 0

    def after(view: EngineView, config: Any, step: int, max_steps: int) -> None:
        parameter = view.trained[name]
        if step == 1:
            setter(view, parameter, value)
            view.reset_state(parameter, steps=False)
        seen.append(view.value(parameter))
        assert torch.equal(view.whole(parameter), seen[-1].bfloat16())

    plant(monkeypatch, full, before_step=before, after_step=after)
    train(make(cell).model, random_examples(0, 30), cell, CPU, control(folder))
    assert torch.equal(seen[1], value) and torch.equal(where[2], value)
    assert 0 < (seen[4] - value).abs().max() < 5e-3


@pytest.mark.parametrize(
    "stage",
    [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2, 3],
)
def test_a_weight_of_bfloat16_keeps_the_digits_it_was_given(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16_values(stage, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "stage",
    [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2, 3],
)
def test_the_law_finds_a_weight_that_was_set_without_its_float32_copy(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_place(_: EngineView, parameter: nn.Parameter, value: Tensor) -> None:
        zero3.fill(parameter, value)

    broken(bf16_values, stage, tmp_path, monkeypatch, in_place)


# --- two ranks


@pytest.mark.slow
def test_two_ranks_read_and_set_what_a_plain_loop_does(tmp_path: Path) -> None:
    on_ranks(PROGRAMS / "steps_program.py", tmp_path)
    first, second = (torch.load(tmp_path / f"2-{rank}.pt", weights_only=False) for rank in (0, 1))
    for key in ENGINES:
        agree(first[key])
        agree(second[key])
        pairs = zip(first[key]["seen"], second[key]["seen"], strict=True)
        assert all(
            torch.equal(mine, theirs)
            for one, other in pairs
            for mine, theirs in zip(one[1:], other[1:], strict=True)
        )
