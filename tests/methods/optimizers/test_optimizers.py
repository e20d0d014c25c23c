"""Optimizers of pretraining: Frobenius decay, moments in 8 bits. The law of each: on every
engine a run is what a loop by hand gives, an interrupted one ends bit for bit like a whole one,
and a planted mutant is found."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import broken, make, process, spec_of  # noqa: F401
from fixtures.planted import plant
from optimizers_program import (
    ADAMW,
    EIGHT_BITS,
    ENGINES,
    FROBENIUS,
    GALORE,
    LLAMA,
    PLAIN,
    RANKED,
    SETTINGS,
    STILL,
    by_hand,
    cell,
    chosen,
    in_factors,
    kept_bytes,
    run,
    states_of,
    two_ranks,
)
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.compatibility import refusal
from finrepro.errors import Interrupted
from finrepro.kinds import kind_module, optimizer_of
from finrepro.methods.adapters import full
from finrepro.methods.optimizers import adamw, adamw_8bit, adamw_frobenius
from finrepro.runtime import process as runtime
from finrepro.runtime import zero3
from finrepro.training.engine_view import EngineView
from finrepro.training.schedule import learning_rate

EVERYWHERE = [
    (*key, dtype)
    for key in ENGINES
    for dtype in ("float32", "bfloat16")
    if (key[0], dtype) != ("ddp", "bfloat16")
]

# --- every optimizer on every engine


def begins_at_its_beginning(engine: Any, stage: int, dtype: str, folder: Path) -> None:
    """After one step Adam counts one, and a weight has been decayed once."""
    spec = cell(chosen(PLAIN, **STILL), engine, stage, dtype=dtype, max_steps=1, warmup_steps=0)
    counts, name = [], "model.layers.0.mlp.up_proj.weight"

    def after(view: EngineView, step: int, max_steps: int) -> None:
        counts.extend(float(state["step"]) for state in view._base.state.values())
        before = dict(make(spec).model.named_parameters())[name].detach().float()
        decayed = before * (1 - spec.train.lr * ADAMW["weight_decay"])
        assert (view.value(view.trained[name]) - decayed).norm() <= 1e-6 * decayed.norm()

    with pytest.MonkeyPatch.context() as patch:
        plant(patch, full, after_step=after)
        run(spec, folder)
    assert set(counts) == {1.0}


@pytest.mark.parametrize(
    ("engine", "stage", "dtype"),
    [
        pytest.param(*key, marks=() if key == ("deepspeed", 0, "bfloat16") else pytest.mark.slow)
        for key in EVERYWHERE
    ],
)
def test_an_engine_takes_no_step_before_the_first(
    engine: Any, stage: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins_at_its_beginning(engine, stage, dtype, tmp_path / "right")
    if (engine, stage, dtype) == ("deepspeed", 0, "bfloat16"):
        unfused = "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer"
        monkeypatch.setattr(f"{unfused}.refresh_fp32_params", lambda _: None)
        broken(begins_at_its_beginning, engine, stage, dtype, tmp_path / "wrong")


# --- Frobenius decay

FEWER = (("ddp", 0),)  # decay alone, below, is tried on another engine
engines = pytest.mark.parametrize(
    ("engine", "stage"),
    [pytest.param(*key, marks=() if key in FEWER else pytest.mark.slow) for key in ENGINES],
)


def slopes_are_autograds(slopes: Any) -> None:
    """The gradients of 0.5 ||B A||_F^2 in float64."""
    generator = torch.Generator().manual_seed(0)
    for r, d_in, d_out in ((1, 5, 3), (4, 6, 9), (7, 7, 7)):
        a, b = (
            torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True)
            for s in ((r, d_in), (d_out, r))
        )
        (0.5 * (b @ a).pow(2).sum()).backward()
        for found, expected in zip(slopes(a.detach(), b.detach()), (a.grad, b.grad), strict=True):
            assert found.shape == expected.shape and (found - expected).abs().max() <= 1e-10


def test_the_decay_is_the_gradient_of_half_the_squared_norm_of_the_product() -> None:
    slopes_are_autograds(adamw_frobenius.decay_gradients)
    broken(slopes_are_autograds, lambda a, b: (a, b))  # plain L2 of the factors
    broken(slopes_are_autograds, lambda a, b: (2 * (b.T @ b) @ a, b @ (a @ a.T)))


def factor_names(names: Any) -> set[str]:
    return {name for name in names if name.endswith((".a.weight", ".b.weight"))}


def decay_of(build: Any) -> dict[str, float]:
    """Name -> plain weight decay of a model in factors."""
    with in_factors():
        named = list(make(spec_of(LLAMA)).model.named_parameters())
    optimizer = build(named, 1e-2, chosen(FROBENIUS).config)
    found = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    return {name: found[id(p)] for name, p in named}


def factors_have_no_plain_decay(build: Any) -> None:
    """Factors none, other matrices the configured one, vectors none."""
    decay = decay_of(build)
    assert len(factor_names(decay)) == 2 * len(adamw_frobenius.pairs(decay)) > 0
    for name, value in decay.items():
        dense = "embed" in name or "lm_head" in name
        assert value == (FROBENIUS["weight_decay"] if dense else 0.0), name


def test_plain_weight_decay_spares_the_factors() -> None:
    factors_have_no_plain_decay(adamw_frobenius.build)
    broken(factors_have_no_plain_decay, adamw.build)


def parts_are_decayed(build: Any) -> None:
    """At ZeRO-3 a matrix of which a rank holds a part is flat and empty by the time that the
    optimizer is made.
    """
    matrix, vector = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))
    matrix.ds_shape, vector.ds_shape = torch.Size([3, 2]), torch.Size([3])  # type: ignore[attr-defined]
    groups = build(
        [("x.weight", matrix), ("x.bias", vector)], 1e-2, chosen(PLAIN).config
    ).param_groups
    assert {id(p): group["weight_decay"] for group in groups for p in group["params"]} == {
        id(matrix): 0.1,
        id(vector): 0,
    }


def test_weight_decay_reaches_a_matrix_that_lies_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts_are_decayed(adamw.build)
    monkeypatch.setattr(adamw, "shape_of", lambda parameter: parameter.shape)
    broken(parts_are_decayed, adamw.build)


def test_pairs_are_recognised_by_name_and_a_factor_alone_is_none() -> None:
    names = [
        "x.b.weight",
        "x.a.weight",
        "y.a.weight",
        "z.b.weight",
        "x.a.bias",
        "b.weight",
        "xa.weight",
    ]
    assert adamw_frobenius.pairs(names) == [("x.a.weight", "x.b.weight")]


def test_a_cell_without_factors_is_refused_by_name() -> None:
    spec = cell(chosen(FROBENIUS))
    assert (
        refusal(spec)
        == f"adamw_frobenius decays the factors of low-rank layers, and {spec.model.name} has none"
    )
    low_rank = dataclasses.replace(spec, model=reader.model("gpt2_127m_mini_lr"))
    assert refusal(low_rank) is None
    adapted = dataclasses.replace(low_rank, adapter=reader.adapter("lora_r8"))
    assert (
        refusal(adapted)
        == "adamw_frobenius decays the factors of low-rank layers, and lora_r8 trains none"
    )


def frobenius_step(spec: Any) -> Any:
    """AdamW from its definition, in float32, and the decay from the old values of both factors."""
    config, state = spec.train.optimizer.config, {}

    def step(named: dict[str, nn.Parameter], rate: float, index: int) -> None:
        for name in [each for each in named if each.endswith(".a.weight")]:
            a, b = named[name], named[name.replace(".a.", ".b.")]
            shrink = rate * config.frobenius_decay
            new = a - shrink * (b.T @ b @ a), b - shrink * (b @ (a @ a.T))
            a.copy_(new[0]), b.copy_(new[1])
        for name, p in named.items():
            m, v = state.setdefault(name, [torch.zeros_like(p), torch.zeros_like(p)])
            if p.ndim >= 2 and name not in factor_names(named):
                p.mul_(1 - rate * config.weight_decay)
            beta1, beta2 = config.betas
            m.mul_(beta1).add_((1 - beta1) * p.grad), v.mul_(beta2).add_((1 - beta2) * p.grad**2)
            hat, root = m / (1 - beta1 ** (index + 1)), (v / (1 - beta2 ** (index + 1))).sqrt()
            p.sub_(rate * hat / (root + config.eps))

    return step


@cache
def expected(**changes: Any) -> dict[str, Any]:
    spec = cell(chosen(FROBENIUS, **changes))
    return by_hand(spec, frobenius_step(spec))


def is_the_loop_by_hand(found: dict[str, Any], plain: dict[str, Any], within: float = 1e-3) -> None:
    """Losses, and every weight, in norm: where a gradient is all but zero, Adam turns rounding
    into a step of either sign.
    """
    np.testing.assert_allclose(found["losses"], plain["losses"], rtol=1e-5)
    for name, value in plain["weights"].items():
        assert (found["weights"][name].float() - value).norm() <= within * value.norm(), name


@engines
def test_a_run_with_frobenius_decay_is_the_loop_by_hand(
    engine: Any, stage: int, tmp_path: Path
) -> None:
    is_the_loop_by_hand(run(cell(chosen(FROBENIUS), engine, stage), tmp_path), expected())


def only_the_model(view: EngineView, config: Any, step: int, max_steps: int) -> None:
    """A mutant: the engine's own copies are forgotten."""
    view.set = lambda parameter, value: zero3.fill(parameter, value)  # type: ignore[method-assign]
    DECAY(view, config, step, max_steps)


def one_after_the_other(view: EngineView, config: Any, step: int, max_steps: int) -> None:
    """A mutant: B is decayed by the new A."""
    for names in adamw_frobenius.pairs(view.trained):
        a, b = (view.trained[name] for name in names)
        shrink = view.rate(a) * config.frobenius_decay
        view.set(
            a,
            view.value(a)
            - shrink * adamw_frobenius.decay_gradients(view.value(a), view.value(b))[0],
        )
        view.set(
            b,
            view.value(b)
            - shrink * adamw_frobenius.decay_gradients(view.value(a), view.value(b))[1],
        )


def plain_l2(view: EngineView, config: Any, step: int, max_steps: int) -> None:
    """A mutant: each factor by itself."""
    for name in factor_names(view.trained):
        each = view.trained[name]
        view.set(each, view.value(each) * (1 - view.rate(each) * config.frobenius_decay))


DECAY = adamw_frobenius.before_step


def decays_alone(engine: Any, stage: int, dtype: str, folder: Path) -> None:
    """With steps that are all but zero the factors are those of decay alone, in float32 also
    where the weights are bfloat16.
    """
    spec = cell(chosen(FROBENIUS, **STILL), engine, stage, dtype=dtype)
    seen: dict[str, Tensor] = {}
    decay = adamw_frobenius.before_step

    def watched(view: EngineView, config: Any, step: int, max_steps: int) -> None:
        if step == max_steps - 1:  # all but the last decay
            seen.update(
                (name, view.value(view.trained[name])) for name in factor_names(view.trained)
            )
        decay(view, config, step, max_steps)

    adamw_frobenius.before_step = watched
    try:
        found = run(spec, folder)
    finally:
        adamw_frobenius.before_step = decay
    with in_factors():
        named = {name: p.detach().float() for name, p in make(spec).model.named_parameters()}
    for name in seen:
        if name.endswith(".a.weight"):
            a, b = named[name].double(), named[name.replace(".a.", ".b.")].double()
            for step in range(spec.train.max_steps - 1):
                shrink = learning_rate(step, spec.train) * FROBENIUS["frobenius_decay"]
                a, b = a - shrink * (b.T @ b @ a), b - shrink * (b @ (a @ a.T))
            for key, value in ((name, a), (name.replace(".a.", ".b."), b)):
                assert (seen[key] - value).norm() <= 1e-5 * value.norm(), key
                assert (seen[key] - named[key]).norm() > 1e-3 * value.norm()
                assert found["weights"][key].dtype == getattr(torch, dtype)


IN_SHORT = (("deepspeed", 3, "bfloat16"),)


@pytest.mark.parametrize(
    ("engine", "stage", "dtype"),
    [pytest.param(*key, marks=() if key in IN_SHORT else pytest.mark.slow) for key in EVERYWHERE],
)
def test_decay_alone_is_exact_wherever_the_optimizer_keeps_its_numbers(
    engine: Any, stage: int, dtype: str, tmp_path: Path
) -> None:
    decays_alone(engine, stage, dtype, tmp_path)


@pytest.mark.parametrize(
    ("mutant", "engine", "stage", "dtype"),
    [
        (one_after_the_other, "ddp", 0, "float32"),
        (plain_l2, "ddp", 0, "float32"),
        *(pytest.param(only_the_model, *key, marks=pytest.mark.slow) for key in EVERYWHERE[-4:]),
    ],
)
def test_the_law_finds_a_decay_that_is_another(
    mutant: Any,
    engine: Any,
    stage: int,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(adamw_frobenius, "before_step", mutant)
    broken(decays_alone, engine, stage, dtype, tmp_path)


def moments_are_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step from the same weights Adam remembers the same bits with and without decay,
    and the weights are others.
    """
    found = []
    for decay in (0.0, 0.5):

        def after(view: EngineView, step: int, max_steps: int) -> None:
            found.append(
                (
                    dict(view._base.state),
                    {name: view.value(p) for name, p in view.trained.items()},
                )
            )

        plant(monkeypatch, adamw_frobenius, after_step=after)
        run(
            cell(chosen(FROBENIUS, frobenius_decay=decay), max_steps=1, warmup_steps=0),
            folder / f"{decay}",
        )
    (without, before), (with_decay, after_decay) = found
    for mine, theirs in zip(without.values(), with_decay.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert {
        name for name in before if not torch.equal(before[name], after_decay[name])
    } == factor_names(before)


def through_the_moments(view: EngineView, config: Any, step: int, max_steps: int) -> None:
    """A mutant: the decay is added to the gradient, as the authors have it for SGD."""
    for names in adamw_frobenius.pairs(view.trained):
        pair = [view.trained[name] for name in names]
        for each, slope in zip(
            pair, adamw_frobenius.decay_gradients(*map(view.value, pair)), strict=True
        ):
            each.grad += config.frobenius_decay * slope


def test_the_moments_know_nothing_of_the_decay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moments_are_the_same(tmp_path / "right", monkeypatch)
    monkeypatch.setattr(adamw_frobenius, "before_step", through_the_moments)
    broken(moments_are_the_same, tmp_path / "wrong", monkeypatch)


def test_bad_settings_are_a_line() -> None:
    from finrepro.errors import UsageError

    with pytest.raises(UsageError, match=r"frobenius_decay.*greater than or equal to 0"):
        chosen(FROBENIUS, frobenius_decay=-0.1)
    assert dataclasses.asdict(chosen(FROBENIUS).config).keys() == {*ADAMW, "frobenius_decay"}


# --- 8 bits


def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 values of the dynamic tree (arXiv 2110.02861, section 1.3), from its definition: a
    decade below another has half as many, and the values of a decade are the middles of equal
    parts of [0.1, 1]; 0 and 1 on top."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade * (1 if signed else 2)
        edges = np.linspace(0.1, 1, count + 1)
        found = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*found, *(-found if signed else [])]
    return np.sort(np.asarray(values + [0.0] * (256 - len(values))))


def nearest(moment: np.ndarray, signed: bool) -> np.ndarray:
    """What 8 bits keep of a moment: blocks of 256, each by its largest magnitude."""
    flat, known = moment.astype(np.float64).reshape(-1), dynamic_map(signed)
    kept = np.empty_like(flat)
    for first in range(0, len(flat), 256):
        block = flat[first : first + 256]
        largest = np.abs(block).max() or 1.0
        kept[first : first + 256] = (
            known[np.abs(block[:, None] / largest - known).argmin(1)] * largest
        )
    return kept.reshape(moment.shape)


def decoded(state: dict[str, Any], which: int) -> np.ndarray:
    """A moment as the optimizer keeps it, in numbers."""
    codes, scales = (
        state[f"state{which}"].numpy(),
        state[f"absmax{which}"].numpy().astype(np.float64),
    )
    values = state[f"qmap{which}"].numpy().astype(np.float64)[codes].reshape(-1)
    return (values * np.repeat(scales, 256)[: values.size]).reshape(codes.shape)


def moments_are_the_nearest(
    state: dict[str, Any], gradient: Tensor, betas: tuple[float, float]
) -> None:
    """After the first step: no kept number is farther from the exact one than the nearest of the
    map is, but by 1e-4 of its block's largest: the library's CPU kernel takes the second nearest
    at times, and raises the smallest of the unsigned ones."""
    for which, exact in ((1, (1 - betas[0]) * gradient), (2, (1 - betas[1]) * gradient**2)):
        truth, scales = exact.numpy().astype(np.float64), state[f"absmax{which}"].numpy()
        best = np.abs(nearest(truth, signed=which == 1) - truth)
        slack = 1e-4 * np.repeat(scales, 256)[: truth.size].reshape(truth.shape)
        assert (np.abs(decoded(state, which) - truth) <= best + slack).all()


def problem(
    bits: int, steps: int = 1, size: tuple[int, int] = (70, 90)
) -> tuple[Any, nn.Parameter, Tensor]:
    """An optimizer after some steps on noisy squares, its weight, and the first gradient."""
    generator = torch.Generator().manual_seed(3)
    target, weight = torch.randn(size, generator=generator), nn.Parameter(torch.zeros(size))
    settings = chosen(EIGHT_BITS if bits == 8 else PLAIN, weight_decay=0.0)
    optimizer = optimizer_of(settings).build([("x.0.weight", weight)], 1e-2)
    scale, first = (
        torch.logspace(-3, 0, size[0])[:, None],
        torch.zeros(0),
    )  # rows of very different gradients
    for step in range(steps):
        weight.grad = scale * (
            weight.detach() - target + 0.3 * torch.randn(size, generator=generator)
        )
        first = weight.grad.clone() if step == 0 else first
        optimizer.step()
    return optimizer, weight, target if steps > 1 else first


def test_the_moments_are_kept_as_the_paper_has_it() -> None:
    optimizer, weight, gradient = problem(8)
    state = optimizer.state[weight]
    for which in (1, 2):
        np.testing.assert_allclose(
            state[f"qmap{which}"].numpy(), dynamic_map(which == 1), rtol=1e-5, atol=1e-9
        )
    moments_are_the_nearest(state, gradient, ADAMW["betas"])
    coarse = {**state, "state1": state["state1"] // 2 * 2}  # seven bits
    broken(moments_are_the_nearest, coarse, gradient, ADAMW["betas"])


def ends_near_float32(weight: Tensor) -> None:
    """Three hundred noisy steps end within 2 % of the way of where float32 moments end; and not
    in the same place.
    """
    exact = problem(32, 300)[1].detach()
    distance = float((weight - exact).norm() / exact.norm())
    assert 0 < distance < 0.02


def test_eight_bits_end_near_thirty_two() -> None:
    ends_near_float32(problem(8, 300)[1].detach())
    broken(ends_near_float32, problem(32, 300)[1].detach())
    broken(ends_near_float32, problem(8, 200)[1].detach())


def test_what_is_small_or_outside_of_the_blocks_keeps_thirty_two_bits(tmp_path: Path) -> None:
    spec = cell(chosen(EIGHT_BITS), max_steps=1)
    shapes = {name: tuple(p.shape) for name, p in make(spec).model.named_parameters()}
    config = spec.train.optimizer.config
    states = states_of(spec, tmp_path / "advised")
    for name, state in states.items():
        small = int(np.prod(shapes[name])) < 4096
        assert (state["state1"].dtype == torch.float32) is (small or ".layers." not in name), name
    assert (
        kept_bytes(states)
        == adamw_8bit.state_bytes(shapes, config)
        < adamw.state_bytes(shapes, config)
    )
    everything = chosen(EIGHT_BITS, embeddings_32bit=False)
    states = states_of(cell(everything, max_steps=1), tmp_path / "all")
    assert states["model.embed_tokens.weight"]["state1"].dtype == torch.uint8
    assert kept_bytes(states) == adamw_8bit.state_bytes(shapes, everything.config)


@pytest.mark.parametrize("kind", [EIGHT_BITS["kind"], GALORE["kind"]])
@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("ddp", "float32"),
        *(
            pytest.param("deepspeed", each, marks=pytest.mark.slow)
            for each in ("float32", "bfloat16")
        ),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_like_a_whole_one(
    kind: str, engine: Any, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = cell(chosen(SETTINGS[kind]), engine, dtype=dtype)
    whole = run(spec, tmp_path / "whole")
    same_bits(interrupted(spec, tmp_path / "cut"), whole)
    if engine == "ddp":
        module = type(
            kind_module("optimizers", spec.train.optimizer.kind).build(
                [("x.0.w", nn.Parameter(torch.ones(2, 2)))], 1.0, spec.train.optimizer.config
            )
        )
        for each in module.__mro__:
            if "load_state_dict" in vars(each):
                monkeypatch.setattr(
                    each, "load_state_dict", lambda *_: None
                )  # a mutant: nothing is taken up
                break
        broken(same_bits, interrupted(spec, tmp_path / "forgotten"), whole)


def interrupted(spec: Any, folder: Path) -> dict[str, Any]:
    """Stopped after three steps, and taken up by a process with other generators."""
    seen: list[Any] = []
    with pytest.raises(Interrupted):
        run(spec, folder, stop=lambda: len(seen) >= 3, seen=seen)
    runtime.setup(123, 2)
    return run(spec, folder)


def same_bits(mine: dict[str, Any], whole: dict[str, Any]) -> None:
    """Losses and weights."""
    assert mine["losses"] == whole["losses"]
    assert all(
        torch.equal(value, whole["weights"][name]) for name, value in mine["weights"].items()
    )


@pytest.mark.parametrize(
    ("kind", "reason"), [(each["kind"], "flat pieces") for each in (EIGHT_BITS, GALORE)]
)
def test_flat_pieces_and_adapters_that_forget_are_refused_by_name(
    kind: str, reason: str, tmp_path: Path
) -> None:
    settings = chosen(SETTINGS[kind])
    for stage in range(4):
        found = refusal(cell(settings, "deepspeed", stage))
        assert (found is None) is (stage == 0)
        assert found is None or (
            reason in found and f"ZeRO-{stage}" in found and kind in found and "\n" not in found
        )

    steps = []

    def after(view: EngineView, step: int, max_steps: int) -> None:
        steps.append(step)
        with pytest.raises(TypeError, match="begin it anew"):
            view.reset_state(view.trained.values())

    with pytest.MonkeyPatch.context() as patch:
        plant(patch, full, after_step=after)
        run(cell(settings, max_steps=1), tmp_path)
    assert steps == [0]
    forgetful = dataclasses.replace(cell(settings), adapter=reader.adapter("rosa_r8"))
    assert "rosa_r8" in str(refusal(forgetful))


# --- two ranks


@pytest.mark.slow
@pytest.mark.parametrize("key", RANKED, ids=str)
def test_two_ranks_hold_the_same_bits_and_end_where_one_does(key: Any, tmp_path: Path) -> None:
    kind, engine, stage = key
    by_loop = kind == FROBENIUS["kind"]
    one = expected() if by_loop else run(cell(chosen(SETTINGS[kind]), engine, stage), tmp_path)
    first, second = (two_ranks()[rank][key] for rank in ("2-0", "2-1"))
    assert first["losses"] == second["losses"]
    if stage < 3:  # at ZeRO-3 the first rank collects them
        assert all(
            torch.equal(value, second["weights"][name]) for name, value in first["weights"].items()
        )
    np.testing.assert_allclose(first["losses"], one["losses"], rtol=1e-5 if by_loop else 1e-3)
    for name, value in one["weights"].items():
        assert (first["weights"][name] - value).norm() <= 5e-3 * value.norm(), name
