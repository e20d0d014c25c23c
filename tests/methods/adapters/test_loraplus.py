"""LoRA+ (arXiv 2402.12354): B's learning rate is a multiple of A's, at every step, under every
engine, and after a resumed run; what has no ratio trains as before, bit by bit."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import CPU, MINIATURES, broken, make, process, random_examples, spec_of  # noqa: F401
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.spec import RunSpec
from finrepro.data.batches import COLLATE
from finrepro.errors import Interrupted, UsageError
from finrepro.kinds import adapter_of, kind_module, optimizer_of
from finrepro.methods.adapters import iec, lora
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.runtime import process as runtime
from finrepro.settings import Choice, build
from finrepro.training import rates
from finrepro.training.checkpoint import Control
from finrepro.training.loop import train
from finrepro.training.schedule import learning_rate
from finrepro.training.steps import steps_from

RATIO, STEPS = 16.0, 5
DATA = random_examples(3, count=40, longest=20, answers=(1, 3))
FEW = {
    "max_steps": STEPS,
    "warmup_steps": 2,
    "global_batch_size": 8,
    "sort_window": 2,
    "max_tokens": 96,
}
ENGINES = [("ddp", 0), *(("deepspeed", stage) for stage in (0, 1, 2, 3))]
over_engines = pytest.mark.parametrize(
    ("engine", "stage"),
    [pytest.param(*each, marks=() if each[1] > 1 else pytest.mark.slow) for each in ENGINES],
)


def plus(**changes: Any) -> Choice:
    config = dataclasses.asdict(reader.adapter("loraplus_r8").config)
    return Choice(name="changed", kind="lora", config=lora.Config(**config | changes))


def iec_plus() -> Choice:
    config = dataclasses.asdict(reader.adapter("iec_r8").config)
    return Choice(name="changed", kind="iec", config=iec.Config(**config | {"lr_ratio_b": RATIO}))


def spec_with(
    adapter: str | Choice, name: str = MINIATURES[1], quantizer: str = "none", **train: Any
) -> RunSpec:
    return spec_of(name, adapter, quantizer, **FEW | train)


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, each) for name, each in model.named_parameters() if each.requires_grad]


def stepped_by(spec: RunSpec, model: nn.Module, scale: Callable[[str], float]) -> Any:
    optimizer = optimizer_of(spec.train.optimizer).build(named(model), 1.0)
    rates.split_groups(optimizer, named(model), scale)
    return optimizer


def trained(
    spec: RunSpec, folder: Path, stop_after: int = STEPS
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and trained parameters."""
    model, seen = make(spec).model, []
    control = Control(
        seen.append, lambda: stop_after <= len(seen) < STEPS, folder, checkpoint_seconds=1e9
    )
    losses = [row["loss"] for row in train(model, DATA, spec, CPU, control).losses]
    return losses, {name: each.detach().clone() for name, each in named(model)}


def plain_loop(spec: RunSpec, ratio: float) -> tuple[list[float], dict[str, Tensor]]:
    """The same without an engine: B in a group whose rate is written out at every step."""
    model = make(spec).model
    lm, settings = SupervisedLM(model), spec.train
    groups: list[dict[str, Any]] = [
        {"params": [each for name, each in named(model) if ("lora_B" in name) is b]}
        for b in (False, True)
    ]
    config = settings.optimizer.config
    optimizer = torch.optim.AdamW(
        groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    losses = []
    for step, rows in steps_from(0, [len(each.ids) for each in DATA], settings, spec.seed):
        for group, factor in zip(optimizer.param_groups, (1.0, ratio), strict=True):
            group["lr"] = factor * learning_rate(step, settings)
        supervised = sum(DATA[row].num_supervised for row in rows)
        loss = torch.stack([lm(COLLATE["padded"]([DATA[row]])) for row in rows]).sum() / supervised
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([each for _, each in named(model)], settings.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: each.detach() for name, each in named(model)}


def computes_alike(
    one: tuple[list[float], dict[str, Tensor]], two: tuple[list[float], dict[str, Tensor]]
) -> None:
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
    for name, value in two[1].items():
        assert (one[1][name] - value).norm() <= 1e-3 * value.norm(), name


@over_engines
@pytest.mark.parametrize(
    ("adapter", "quantizer"),
    [
        ("loraplus_r8", "none"),
        pytest.param("loraplus_r8", "nf4", marks=pytest.mark.slow),
        ("dora", "nf4"),
        pytest.param("iec", "nf4", marks=pytest.mark.slow),
    ],
)
def test_every_engine_equals_a_plain_loop_with_two_rates(
    adapter: str, quantizer: str, engine: Any, stage: int, tmp_path: Path
) -> None:
    """Also with DoRA, whose magnitudes keep A's rate, where DoRA can run, and with IEC, whose
    scalars do.
    """
    method: str | Choice = {"dora": plus(use_dora=True), "iec": iec_plus()}.get(adapter, adapter)
    spec = spec_with(method, quantizer=quantizer, engine=engine, zero_stage=stage)
    if kind_module("adapters", spec.adapter.kind).supports(
        spec.model, spec.quantizer, stage, spec.adapter.config
    ):
        assert (adapter, stage) == ("dora", 3)
        return
    found = trained(spec, tmp_path)
    computes_alike(found, plain_loop(spec, RATIO))
    broken(computes_alike, found, plain_loop(spec, 1.0))


@over_engines
def test_the_ratio_holds_at_every_step_and_in_a_resumed_run(
    engine: Any, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finrepro.training import loop

    seen: list[list[tuple[float, float]]] = []
    step = loop.optimizer_step

    def watched(started: Any, *rest: Any) -> tuple[float, float]:
        seen.append([(group["lr_scale"], group["lr"]) for group in started.param_groups])
        return step(started, *rest)

    monkeypatch.setattr(loop, "optimizer_step", watched)
    spec = spec_with("loraplus_r8", engine=engine, zero_stage=stage)
    whole = trained(spec, tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(spec, tmp_path / "cut", stop_after=2)
    runtime.setup(123, 2)
    resumed = trained(spec, tmp_path / "cut")
    assert resumed[0] == whole[0] and all(
        torch.equal(resumed[1][name], each) for name, each in whole[1].items()
    )
    expected = [learning_rate(step, spec.train) for step in (*range(STEPS), 0, 1, *range(2, STEPS))]
    assert seen == [[(1.0, rate), (RATIO, RATIO * rate)] for rate in expected]


@pytest.mark.parametrize("adapter", ["loraplus_r8", "dora", "iec", "lora_r8", "full"])
def test_the_groups_hold_every_trained_parameter_once_at_its_rate(adapter: str) -> None:
    """A, DoRA's magnitudes and IEC's scalars at the plain rate, B at its multiple; what has one
    rate keeps the optimizer's own groups.
    """
    method: str | Choice = {"dora": plus(use_dora=True), "iec": iec_plus()}.get(adapter, adapter)
    spec = spec_with(method)
    model = make(spec).model
    optimizer = stepped_by(spec, model, adapter_of(spec.adapter).lr_scale)
    held = [id(each) for group in optimizer.param_groups for each in group["params"]]
    assert sorted(held) == sorted(id(each) for _, each in named(model))
    factor = {
        id(each): group["lr_scale"] for group in optimizer.param_groups for each in group["params"]
    }
    ratio = spec.adapter.config.lr_ratio_b if adapter != "full" else 1.0
    for name, each in named(model):
        assert factor[id(each)] == (ratio if "lora_B" in name else 1.0), name
    assert (
        len(optimizer.param_groups)
        == {"loraplus_r8": 2, "dora": 3, "iec": 3, "lora_r8": 1, "full": 2}[adapter]
    )
    assert all(group["lr"] == group["lr_scale"] for group in optimizer.param_groups)


def test_splitting_changes_no_bit_where_the_rates_are_equal() -> None:
    """AdamW in two groups of one rate is AdamW in one: only the ratio makes LoRA+ another
    method.
    """
    found = []
    for scale in (lambda _: 1.0, lambda name: 2.0 if "lora_B" in name else 1.0):
        spec = spec_with("lora_r8")
        model = make(spec).model
        optimizer = stepped_by(spec, model, scale)
        lm = SupervisedLM(model)
        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            lm(COLLATE["padded"](DATA[step : step + 4])).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(
            (len(optimizer.param_groups), {name: each.detach() for name, each in named(model)})
        )
    assert [groups for groups, _ in found] == [1, 2]
    assert all(torch.equal(found[1][1][name], each) for name, each in found[0][1].items())


def test_weight_decay_reaches_a_and_b_at_their_own_rates_and_no_magnitude() -> None:
    """Without a gradient a step is the decay alone: w (1 - rate * decay)."""
    adamw = {"kind": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.5}
    spec = spec_with(plus(use_dora=True), optimizer=adamw)
    model = make(spec).model
    with torch.no_grad():
        for _, each in named(model):
            each.fill_(1.0)
    optimizer = stepped_by(spec, model, adapter_of(spec.adapter).lr_scale)
    rates.set_rate(optimizer.param_groups, 1e-2)
    for _, each in named(model):
        each.grad = torch.zeros_like(each)
    optimizer.step()
    for name, each in named(model):
        decay = 0.0 if "magnitude" in name else 0.5 * 1e-2 * (RATIO if "lora_B" in name else 1.0)
        assert torch.allclose(each, torch.full_like(each, 1 - decay), rtol=1e-6), name


def test_any_optimizer_is_split_eight_bit_ones_too() -> None:
    """The first step of Adam is the rate times the gradient's sign."""
    import bitsandbytes

    weights = [nn.Parameter(torch.ones(64, 128)) for _ in "ab"]
    optimizer = bitsandbytes.optim.AdamW8bit(weights, lr=1e-3, weight_decay=0.0)
    rates.split_groups(
        optimizer, zip(("a", "b"), weights, strict=True), {"a": 1.0, "b": RATIO}.__getitem__
    )
    rates.set_rate(optimizer.param_groups, 1e-4)
    for each in weights:
        each.grad = torch.ones_like(each)
    optimizer.step()
    moved = [float((1 - each).detach().mean()) for each in weights]
    np.testing.assert_allclose(moved, [1e-4, RATIO * 1e-4], rtol=1e-3)


def test_it_is_a_method_of_its_own_and_changes_nothing_else() -> None:
    plain, other = reader.adapter("lora_r8"), reader.adapter("loraplus_r8")
    assert other.config == dataclasses.replace(plain.config, lr_ratio_b=RATIO)
    assert spec_with("lora_r8").run_id != spec_with("loraplus_r8").run_id


@pytest.mark.parametrize("ratio", [0.5, 0.0, math.inf, "16"])
def test_a_ratio_below_one_is_refused(ratio: Any) -> None:
    values = dataclasses.asdict(reader.adapter("loraplus_r8").config) | {"lr_ratio_b": ratio}
    with pytest.raises(UsageError, match=r"^adapters\.x[^\n]*$"):
        build(lora.Config, values, "adapters.x")
