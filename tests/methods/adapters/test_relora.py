"""ReLoRA. The law: on every engine a run is what a plain loop over dense weights gives, in which
the update is merged, A drawn anew and most of the moments forgotten; an interrupted one ends bit
for bit like a whole one, and the export is a dense model of the same logits."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import (  # noqa: F401
    MINIATURES,
    all_logits,
    assert_close,
    broken,
    images,
    make,
    process,
    random_examples,
    stir,
)
from optimizers_program import (
    EIGHT_BITS,
    ENGINES,
    GPT2,
    LLAMA,
    RELORA_RANKED,
    chosen,
    relora,
    run_relora,
    two_ranks,
)
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.compatibility import refusal
from finrepro.data.batches import COLLATE
from finrepro.errors import Interrupted
from finrepro.kinds import kind_module
from finrepro.methods.adapters import relora as method
from finrepro.methods.layers.relora import ReloraLinear
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.models.build import configuration, load
from finrepro.runtime import process as runtime
from finrepro.runtime import zero3
from finrepro.training.engine_view import EngineView
from finrepro.training.schedule import learning_rate
from finrepro.training.steps import steps_from

IDS = random_examples(11, count=1, longest=30)[0].ids * 3
AFTER_STEP = method.after_step
BY_DEFAULT = ((GPT2, "ddp", 0), (LLAMA, "deepspeed", 3))
runs = pytest.mark.parametrize(
    ("name", "engine", "stage"),
    [
        pytest.param(name, *key, marks=() if (name, *key) in BY_DEFAULT else pytest.mark.slow)
        for name in MINIATURES
        for key in ENGINES
    ],
)


def kept(first: np.ndarray, share: float) -> np.ndarray:
    """1 where a first moment is among the largest magnitudes, else 0."""
    mask = np.zeros(first.size)
    mask[np.argsort(-np.abs(first.reshape(-1)), kind="stable")[: int(share * first.size)]] = 1
    return mask.reshape(first.shape)


@cache
def expected(name: str) -> dict[str, Any]:
    """The same by hand: torch alone, dense weights, one example a forward pass, no hooks."""
    spec = relora(name=name)
    settings, config, examples, losses, rates = (
        spec.train,
        spec.adapter.config,
        random_examples(0, 30),
        [],
        [],
    )
    model: Any = load(spec, None)
    layers = {layer.name: layer for layer in method.layers_of(make(spec).model)}
    flip = (lambda matrix: matrix.T) if spec.model.family == "gpt2" else (lambda matrix: matrix)
    frozen = {each: flip(model.get_submodule(each).weight).detach().clone() for each in layers}
    a = {each: nn.Parameter(layer.drawn(0)) for each, layer in layers.items()}
    b = {each: nn.Parameter(torch.zeros(len(frozen[each]), config.r)) for each in layers}
    named = {
        each: p
        for each, p in model.named_parameters()
        if each.removesuffix(".weight") not in layers
    }
    named |= {f"{each}.a": p for each, p in a.items()} | {f"{each}.b": p for each, p in b.items()}
    optimizer = kind_module("optimizers", settings.optimizer.kind).build(
        list(named.items()), 1.0, settings.optimizer.config
    )
    for step, rows in steps_from(0, [len(each.ids) for each in examples], settings, spec.seed):
        place = step % config.reset_every
        rises = step >= config.reset_every and place < config.restart_warmup
        rates.append(
            learning_rate(step, settings) * ((place + 1) / config.restart_warmup if rises else 1)
        )
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        dense = {
            f"model.{each}.weight": flip(frozen[each] + config.lora_scale * b[each] @ a[each])
            for each in layers
        }
        batches = [COLLATE["padded"]([examples[row]]) for row in rows]
        lm, supervised = SupervisedLM(model), sum(examples[row].num_supervised for row in rows)
        loss = (
            sum(torch.func.functional_call(lm, dense, (batch,)) for batch in batches) / supervised
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), settings.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            if (step + 1) % config.reset_every == 0 and step + 1 < settings.max_steps:
                for each, layer in layers.items():
                    frozen[each] += config.lora_scale * b[each] @ a[each]
                    a[each].copy_(layer.drawn((step + 1) // config.reset_every))
                    b[each].zero_()
                    for state in (optimizer.state[a[each]], optimizer.state[b[each]]):
                        mask = torch.from_numpy(
                            kept(state["exp_avg"].numpy(), config.keep_moments)
                        ).float()
                        state["exp_avg"] *= mask
                        state["exp_avg_sq"] *= mask
    weights = {each: p.detach().clone() for each, p in model.named_parameters()}
    with torch.no_grad():
        weights |= {
            f"{each}.weight": flip(frozen[each] + config.lora_scale * b[each] @ a[each])
            for each in layers
        }
    return {"losses": losses, "rates": rates, "weights": weights}


def is_the_plain_loop(found: dict[str, Any], name: str) -> None:
    """Losses, rates, and every weight of what is exported."""
    plain = expected(name)
    np.testing.assert_allclose(found["losses"], plain["losses"], rtol=1e-4)
    np.testing.assert_allclose(found["rates"], plain["rates"], rtol=1e-12)
    assert set(found["weights"]) <= set(plain["weights"]) and len(found["weights"]) > 10
    for each, value in found["weights"].items():
        if not each.endswith(
            "c_attn.bias"
        ):  # keys' have no gradient but rounding, and Adam turns that into steps
            assert_close(value, plain["weights"][each], 2e-3, what=each)


@runs
def test_a_run_is_the_plain_loop(name: str, engine: Any, stage: int, tmp_path: Path) -> None:
    is_the_plain_loop(run_relora(relora(engine, stage, name), tmp_path), name)


def forgets_nothing(view: EngineView, config: Any, step: int, max_steps: int) -> None:
    """A mutant."""
    view.change_state = lambda *_: None  # type: ignore[method-assign]
    AFTER_STEP(view, config, step, max_steps)


def sets_the_model_alone(view: EngineView, config: Any, step: int, max_steps: int) -> None:
    """A mutant: the engine's own copies of A and B are forgotten."""
    view.set = lambda parameter, value: zero3.fill(parameter, value)  # type: ignore[method-assign]
    AFTER_STEP(view, config, step, max_steps)


def one_step_late(view: EngineView, config: Any, step: int, max_steps: int) -> None:
    """A mutant."""
    AFTER_STEP(view, config, step - 1, max_steps)


def never(*_: Any) -> None:
    """A mutant: LoRA."""


@pytest.mark.parametrize(
    ("mutant", "engine", "stage"),
    [
        (forgets_nothing, "ddp", 0),
        (one_step_late, "ddp", 0),
        (never, "ddp", 0),
        *(
            pytest.param(sets_the_model_alone, "deepspeed", stage, marks=pytest.mark.slow)
            for stage in (1, 2, 3)
        ),
    ],
)
def test_the_law_finds_a_reset_that_is_another(
    mutant: Any, engine: Any, stage: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(method, "after_step", mutant)
    broken(is_the_plain_loop, run_relora(relora(engine, stage, GPT2), tmp_path), GPT2)


def test_the_law_finds_a_rate_that_does_not_rise_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(method, "lr_factor", lambda *_, **__: 1.0)
    broken(is_the_plain_loop, run_relora(relora(name=GPT2), tmp_path), GPT2)


def same_bits(mine: dict[str, Any], whole: dict[str, Any]) -> None:
    """Losses and what is exported."""
    assert (mine["losses"], mine["rates"]) == (whole["losses"], whole["rates"])
    assert mine["weights"].keys() == whole["weights"].keys() != set()
    assert all(
        torch.equal(value, whole["weights"][name]) for name, value in mine["weights"].items()
    )


def cut(spec: Any, steps: int, folder: Path) -> dict[str, Any]:
    """Stopped after so many steps, and taken up by a process with other generators."""
    seen: list[Any] = []
    with pytest.raises(Interrupted):
        run_relora(spec, folder, stop=lambda: len(seen) >= steps, seen=seen)
    runtime.setup(123, 2)
    return run_relora(spec, folder)


@pytest.mark.parametrize(
    ("name", "engine", "stage", "dtype", "steps"),
    [
        (GPT2, "ddp", 0, "float32", 4),  # in the second period
        *(
            pytest.param(*key, marks=pytest.mark.slow)
            for key in (
                (LLAMA, "deepspeed", 0, "float32", 3),  # right after a reset
                (LLAMA, "deepspeed", 0, "bfloat16", 7),
                (LLAMA, "deepspeed", 2, "bfloat16", 4),
                (GPT2, "deepspeed", 3, "float32", 7),
                (GPT2, "deepspeed", 3, "bfloat16", 4),
            )
        ),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_like_a_whole_one(
    name: str,
    engine: Any,
    stage: int,
    dtype: str,
    steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = relora(engine, stage, name, dtype)
    whole = run_relora(spec, tmp_path / "whole")
    same_bits(cut(spec, steps, tmp_path / "cut"), whole)
    if engine == "ddp":
        monkeypatch.setattr(
            method, "load_state", lambda *_: None
        )  # a mutant: what was merged is lost
        broken(same_bits, cut(spec, steps, tmp_path / "forgotten"), whole)


# --- without an engine


class Bare:
    """What the hook needs of a training, for a model that nobody trains."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.changed = model, 0

    def value(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().float().clone()

    def set(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.data.copy_(value)

    set_frozen = set

    def change_state(self, *_: Any) -> None:
        self.changed += 1


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return all_logits(model.eval(), IDS)


def a_reset_changes_the_parts_and_not_the_sum(model: nn.Module, config: Any, reset: Any) -> None:
    """The same logits; A another, B zero, all else as it was."""
    before, parts = logits(model), images(model.named_parameters())
    view = Bare(model)
    reset(view, config, 2, 100)
    assert_close(logits(model), before, 1e-5)
    after = images(model.named_parameters())
    moved = {name for name in parts if parts[name] != after[name]}
    assert moved == {name for name in parts if "lora_" in name or "base_layer.weight" in name}
    layers = method.layers_of(model)
    assert all(
        not layer.lora_B.any() and torch.equal(layer.lora_A, layer.drawn(1)) for layer in layers
    )
    assert view.changed == 2 * len(layers)


@pytest.mark.parametrize("name", MINIATURES)
def test_a_reset_changes_the_parts_and_not_the_sum(name: str) -> None:
    spec = relora(name=name)
    a_reset_changes_the_parts_and_not_the_sum(
        stir(make(spec).model), spec.adapter.config, AFTER_STEP
    )
    twice = stir(make(spec).model)

    def half(view: Bare, *rest: Any) -> None:
        for layer in method.layers_of(view.model):
            layer.scale = 0.5
        AFTER_STEP(view, *rest)

    broken(a_reset_changes_the_parts_and_not_the_sum, twice, spec.adapter.config, half)


def small_updates_add_up(forget: bool) -> None:
    """In bfloat16 twenty updates of a thousandth of W each arrive: W is kept in float32 beside
    its rounding.
    """
    base = nn.Linear(32, 48, dtype=torch.bfloat16)
    layer = ReloraLinear(base, "x", 4, 1.0, 0)
    generator = torch.Generator().manual_seed(0)
    truth = base.weight.detach().double()
    for period in range(20):
        a = layer.drawn(period)
        b = 1e-3 * torch.randn(48, 4, generator=generator)
        truth += b.double() @ a.double()
        merged = layer.merged(a, b)
        layer.exact = merged.bfloat16().float() if forget else merged
        base.weight.data.copy_(layer.stored(merged))
    assert base.weight.dtype == torch.bfloat16 and layer.exact is not None
    assert_close(layer.exact.double(), truth, 1e-5)
    assert_close(base.weight.double(), truth, 3e-3)


def test_in_bfloat16_small_updates_add_up() -> None:
    small_updates_add_up(forget=False)
    broken(small_updates_add_up, forget=True)


def test_a_factor_is_drawn_from_the_seed_the_period_and_the_layers_name_alone() -> None:
    base = nn.Linear(64, 48)
    state = torch.get_rng_state()
    drawn = {
        (seed, period, name): ReloraLinear(base, name, 8, 1.0, seed).drawn(period)
        for seed in (0, 1)
        for period in (0, 1)
        for name in ("x", "y")
    }
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(each.flatten().tolist()) for each in drawn.values()}) == len(drawn)
    torch.rand(3)
    assert torch.equal(ReloraLinear(base, "x", 8, 1.0, 0).drawn(1), drawn[0, 1, "x"])
    values = torch.cat([each.flatten() for each in drawn.values()]) * 8
    assert 0.99 < values.abs().max() <= 1 and abs(float(values.std()) * 3**0.5 - 1) < 0.04


def keeps_the_largest(choose: Any) -> None:
    """Both moments, where the first one is large."""
    first, second = torch.tensor([[3.0, -9, 1], [0, 7, -2]]), torch.arange(6.0).reshape(2, 3) + 1
    found = choose({"exp_avg": first, "exp_avg_sq": second}, 0.5)
    assert found["exp_avg"].tolist() == [[3, -9, 0], [0, 7, 0]]
    assert found["exp_avg_sq"].tolist() == [[1, 2, 0], [0, 5, 0]]
    assert not any(
        each.any() for each in choose({"exp_avg": first, "exp_avg_sq": second}, 0.0).values()
    )


def test_a_reset_keeps_the_largest_moments() -> None:
    keeps_the_largest(method.largest)

    def each_for_itself(moments: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
        return {name: method.largest({name: value}, keep)[name] for name, value in moments.items()}

    broken(keeps_the_largest, each_for_itself)


def test_shares_of_the_run_are_steps() -> None:
    config = reader.adapter("relora").config
    assert method.period_of(config, 20_000) == 5000 and method.warmup_of(config, 20_000) == 100
    factors = [method.lr_factor(step, config, 400) for step in range(400)]
    assert [step for step, each in enumerate(factors) if each < 1] == [100, 200, 300] and factors[
        100
    ] == 0.5
    assert method.rank_of(config, 768, 3072) == 192 and method.rank_of(config, 4096, 1024) == 256


def test_what_does_not_go_together_is_refused_by_name() -> None:
    spec = relora()
    assert refusal(spec) is None
    narrow = relora(reset_every=2)
    assert "leaves no step at the full rate between resets every 2 steps" in str(refusal(narrow))
    wide = relora(r=4096)
    assert "rank 4096 is more than" in str(refusal(wide))
    rounded = dataclasses.replace(spec, quantizer=reader.quantizer("nf4", "float32"))
    assert refusal(rounded) == "ReLoRA on nf4: it changes the dense weights"
    eight = dataclasses.replace(spec.train, optimizer=chosen(EIGHT_BITS))
    assert "relora begins moments anew" in str(refusal(dataclasses.replace(spec, train=eight)))


def test_on_a_real_model_it_trains_as_many_parameters_as_counted() -> None:
    from transformers import AutoModelForCausalLM

    model, choice = reader.model("gpt2_127m"), reader.adapter("relora")
    with torch.device("meta"):
        adapted = method.apply(
            AutoModelForCausalLM.from_config(configuration(model)), choice.config, 0
        )
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == method.trainable_parameters(model, choice.config)
    blocks = 12 * (192 * (768 + 2304) + 192 * (768 + 768) + 2 * 192 * (768 + 3072))
    assert trained == model.parameters - 12 * 12 * 768**2 + blocks


# --- two ranks


@pytest.mark.slow
@pytest.mark.parametrize("key", RELORA_RANKED, ids=str)
def test_two_ranks_are_the_plain_loop_and_the_first_exports_all_of_it(key: Any) -> None:
    first, second = (two_ranks()[rank]["relora", *key] for rank in ("2-0", "2-1"))
    is_the_plain_loop(first, LLAMA)
    assert first["losses"] == second["losses"] and not second["weights"]
