"""ROSA. The law: the layer computes y = (W_f + B A) x, where a resample (arXiv 2407.07802)
changes the parts and not the sum, and draws new singular directions of it; all periods together
are one LoRA. The references are NumPy, in float64."""

import copy
import dataclasses
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import (
    MINIATURES,
    all_logits,
    assert_close,
    broken,
    images,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
)
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import UsageError
from finrepro.methods.adapters import rosa as method
from finrepro.methods.layers import rosa
from finrepro.methods.layers.linear import is_conv1d, linear_layers
from finrepro.methods.layers.rosa import Factors, RosaLinear, directions, factors
from finrepro.models.build import load
from finrepro.settings import Choice, build

IDS = random_examples(11, count=1, longest=30)[0].ids * 3
FOREVER = 10**9
both = pytest.mark.parametrize("name", MINIATURES)
SHAPES = ((64, 192), (192, 64), (64, 32), (5, 3))  # (out, in)
gauges = pytest.mark.parametrize("gauge", ["sqrt", "code"])


@pytest.fixture(autouse=True)
def _one_thread(process: None) -> None:  # noqa: F811
    """Two threads wait for each other longer than they compute, where other processes want the
    cores as well: SVDs are small here.
    """
    torch.set_num_threads(1)


def spec_with(name: str, dtype: str = "float32", **changes: Any) -> RunSpec:
    """A cell with the entry's settings, changed."""
    config = dataclasses.replace(reader.adapter("rosa_r8").config, **changes)
    choice = Choice(name="changed", kind="rosa", config=config)
    return spec_of(dataclasses.replace(spec_of(name).model, dtype=dtype), choice)


class Bare:
    """What the hooks need of a training, for a model that nobody trains."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.reset = model, []

    def value(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().clone()

    def set(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.data.copy_(value)

    def reset_state(self, parameters: Iterable[nn.Parameter]) -> None:
        self.reset.append(list(parameters))


def resample(model: nn.Module, spec: RunSpec) -> None:
    every = spec.adapter.config.resample_every
    method.after_step(Bare(model), spec.adapter.config, every - 1, FOREVER)


def after(spec: RunSpec, periods: int) -> nn.Module:
    """A model in the middle of its last period: each time its factors are moved somewhere else."""
    model = make(spec).model
    for period in range(periods):
        if period:
            resample(model, spec)
        stir(model, seed=period)
    return model


def effective(model: nn.Module) -> dict[str, Tensor]:
    """Name -> W_f + B A as (out, in), in float64, from what the layer stores."""
    found = {}
    for layer in method.layers_of(model):
        weight = layer.base_layer.weight.detach().double()
        found[layer.name] = (weight.T if is_conv1d(layer.base_layer) else weight) + product(
            layer.lora_A, layer.lora_B
        )
    return found


def product(a: Tensor, b: Tensor) -> Tensor:
    return b.detach().double() @ a.detach().double()


def originals(spec: RunSpec) -> dict[str, Tensor]:
    layers = linear_layers(load(spec, None))
    return {
        name: (each.weight.T if is_conv1d(each) else each.weight).detach().double()
        for name, each in layers.items()
    }


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return all_logits(model, IDS)


# --- the factors of one matrix


def by_definition(
    weight: np.ndarray, chosen: np.ndarray, gauge: str
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of the equations; of a singular vector and its negative the one whose largest
    entry on the side of U is positive.
    """
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    u, s, vh = u[:, chosen], s[chosen], vh[chosen]
    sign = np.sign(u[np.abs(u).argmax(0), np.arange(len(chosen))])
    u, vh = u * sign, vh * sign[:, None]
    return (s[:, None] * vh, u) if gauge == "code" else (np.sqrt(s)[:, None] * vh, u * np.sqrt(s))


def spread(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A matrix whose singular values are far apart, so that rounding cannot mix their
    directions.
    """
    generator, count = np.random.default_rng(seed), min(shape)
    u, vh = (np.linalg.qr(generator.normal(size=(size, count)))[0] for size in shape)
    return torch.from_numpy(u * np.linspace(2, 0.1, count) @ vh.T).float()


def are_singular_directions(found: Factors, weight: Tensor, chosen: Tensor, gauge: str) -> None:
    expected = by_definition(weight.double().numpy(), chosen.numpy(), gauge)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other, atol=2e-5 * np.abs(other).max())


@gauges
@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_are_the_chosen_singular_directions(shape: tuple[int, int], gauge: Any) -> None:
    weight = spread(shape)
    chosen = directions("random", min(shape), 3, 0, 0, "layer")
    found = factors(weight, chosen, gauge)
    are_singular_directions(found, weight, chosen, gauge)
    a, b = found
    for mutant in (
        Factors(a.flip(0), b.flip(1)),  # another order
        Factors(-a, -b),  # the other sign
        Factors(a * 1.01, b / 1.01),  # another gauge
        factors(weight, chosen, "sqrt" if gauge == "code" else "code"),
        factors(weight, (chosen + 1) % min(shape), gauge) if min(shape) > 3 else Factors(a * 2, b),
    ):
        broken(are_singular_directions, mutant, weight, chosen, gauge)


def test_both_gauges_have_one_product_and_gradients_that_differ_by_roots_of_s() -> None:
    """S15. B' g x' at A: with S^1/2 less of B in `code`, and at B with S^1/2 more of A."""
    weight = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    chosen, slope = (
        torch.tensor([1, 4, 6]),
        torch.randn(12, 7, generator=torch.Generator().manual_seed(1)),
    )
    sqrt, code = factors(weight, chosen, "sqrt"), factors(weight, chosen, "code")
    assert_close(sqrt.b @ sqrt.a, code.b @ code.a, 1e-6)
    root = torch.linalg.svdvals(weight)[chosen].sqrt()
    assert_close(code.b.T @ slope, sqrt.b.T @ slope / root[:, None], 1e-5)
    assert_close(slope @ code.a.T, root * (slope @ sqrt.a.T), 1e-5)
    assert_close(sqrt.b.T @ sqrt.b, sqrt.a @ sqrt.a.T, 1e-5)  # balanced
    assert_close(code.b.T @ code.b, torch.eye(3), 1e-5)


def test_the_gauge_code_takes_the_authors_step() -> None:
    """Theirs decomposes W as (in, out) into U S and V^T, x W = (x U S) V^T: one step of SGD
    changes the product as theirs does, which ours with S on the output's side does not.
    """
    weight, chosen = spread((7, 12)), torch.tensor([0, 3, 5])
    slope = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))  # of the loss, at W
    u, s, vh = torch.linalg.svd(weight.T, full_matrices=False)
    first, second = u[:, chosen] * s[chosen], vh[chosen]
    stepped = (first - 0.1 * slope.T @ second.T) @ (second - 0.1 * first.T @ slope.T)

    def after_a_step(factored: Factors) -> Tensor:
        a, b = factored
        return (b - 0.1 * slope @ a.T) @ (a - 0.1 * b.T @ slope)

    found = factors(weight, chosen, "code")
    assert_close(after_a_step(found), stepped.T, 1e-5)
    swapped = Factors(found.a / s[chosen][:, None], found.b * s[chosen])
    broken(assert_close, after_a_step(swapped), stepped.T, 1e-5)


# --- J

DRAWS, COUNT, R = 5000, 20, 3
# Of the sum of squares below, which has COUNT - 1 degrees of freedom: one uniform draw in 10,000
# gives more.
LARGEST_CHI_SQUARE = 50.8


def is_a_uniform_subset(draw: Callable[[int], Tensor]) -> None:
    """S2: R different indices, every one equally often, also the first and the last, and every
    pair.
    """
    drawn = np.stack([draw(each).numpy() for each in range(DRAWS)])
    assert drawn.shape == (DRAWS, R) and all(len(set(each)) == R for each in drawn.tolist())
    often, expected = np.bincount(drawn.ravel(), minlength=COUNT), DRAWS * R / COUNT
    assert len(often) == COUNT
    # Without replacement the counts vary less than a binomial's, and together: (1 - R / COUNT)
    # COUNT / (COUNT - 1).
    scale = (1 - R / COUNT) * COUNT / (COUNT - 1)
    assert ((often - expected) ** 2).sum() / expected / scale < LARGEST_CHI_SQUARE
    together = np.zeros((COUNT, COUNT), int)
    for each in drawn:
        together[np.ix_(each, each)] += 1
    pairs = together[np.triu_indices(COUNT, 1)]
    assert pairs.min() > 0 and pairs.max() < 2 * DRAWS * R * (R - 1) / COUNT / (COUNT - 1)


def window(period: int) -> Tensor:
    """A mutant, the authors' code: neighbours, and never the last."""
    return int(np.random.default_rng(period).integers(0, COUNT - R)) + torch.arange(R)


def without_the_last(period: int) -> Tensor:
    """A mutant: a range too short by one."""
    return directions("random", COUNT - 1, R, 0, period, "layer")


def with_replacement(period: int) -> Tensor:
    """A mutant."""
    return torch.from_numpy(np.random.default_rng(period).integers(0, COUNT, R))


def test_directions_are_a_uniform_subset_without_replacement() -> None:
    is_a_uniform_subset(lambda period: directions("random", COUNT, R, 0, period, "layer"))
    for mutant in (window, without_the_last, with_replacement):
        broken(is_a_uniform_subset, mutant)


def test_seed_period_and_name_decide_the_directions_and_nothing_else() -> None:
    state = torch.get_rng_state()
    first = directions("random", 768, 8, 0, 0, "h.0.attn")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert (
        first.tolist()
        == directions("random", 768, 8, 0, 0, "h.0.attn").tolist()
        == sorted(first.tolist())
    )
    others = [
        (1, 0, "h.0.attn"),
        (0, 1, "h.0.attn"),
        (0, 0, "h.1.attn"),
        (0, 10, "h.0.attn"),
        (10, 0, "h.0.attn"),
    ]
    drawn = {tuple(directions("random", 768, 8, *each).tolist()) for each in others}
    assert len(drawn | {tuple(first.tolist())}) == 6
    assert directions("top", 10, 3, 0, 0, "").tolist() == [0, 1, 2]
    assert directions("bottom", 10, 3, 5, 7, "x").tolist() == [7, 8, 9]


@both
def test_layers_and_periods_have_directions_of_their_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        rosa, "directions", lambda *given: asked.append(given) or directions(*given)
    )
    spec = spec_with(name)
    after(spec, 3)
    names = list(originals(spec))
    assert [each[4:] for each in asked] == [
        (period, layer) for period in range(3) for layer in names
    ]
    assert all(each[0] == "random" and each[2:4] == (8, 0) for each in asked)
    sizes = [min(each.shape) for each in originals(spec).values()] * 3
    assert [each[1] for each in asked] == sizes


# --- a resample


def a_resample_keeps_the_sum(model: nn.Module, spec: RunSpec) -> None:
    """S1: W_f + B A within 1e-6, the logits within 1e-5; A, B and W_f are others."""
    before, said = effective(model), logits(model)
    parts = images(model.named_parameters())
    resample(model, spec)
    for each, weight in effective(model).items():
        assert_close(weight, before[each], 1e-6, what=each)
    assert_close(logits(model), said, 1e-5)
    kept = {
        each for each, image in images(model.named_parameters()).items() if parts[each] == image
    }
    assert not [each for each in kept if each.endswith(("lora_A", "lora_B", "base_layer.weight"))]


def not_merged(layer: RosaLinear, frozen: Tensor, trained: Any) -> Any:
    """A mutant: what was learned is forgotten."""
    return NEXT_PERIOD(
        layer, frozen, None if trained is None else Factors(trained.a, 0 * trained.b)
    )


NEXT_PERIOD = RosaLinear.next_period


@both
@gauges
def test_a_resample_changes_the_parts_and_not_the_sum(
    name: str, gauge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_with(name, gauge=gauge)
    model = after(spec, 2)
    a_resample_keeps_the_sum(copy.deepcopy(model), spec)
    monkeypatch.setattr(RosaLinear, "next_period", not_merged)
    broken(a_resample_keeps_the_sum, copy.deepcopy(model), spec)
    monkeypatch.undo()
    # nothing is subtracted
    monkeypatch.setattr(rosa, "subtract", lambda weight, start: rosa.NextPeriod(weight, start))
    broken(a_resample_keeps_the_sum, copy.deepcopy(model), spec)


def follows_the_equations(name: str, changes: dict[str, Any], rate: float = 0.01) -> None:
    """Gradient descent on |(W_f + B A) x - y|^2 through three periods, in float64 by NumPy, and
    the layer's own.
    """
    spec = spec_with(name, target_modules=("c_attn",) if "gpt2" in name else ("k_proj",), **changes)
    config, model = spec.adapter.config, make(spec).model
    layer = method.layers_of(model)[0]
    frozen = originals(spec)[layer.name].numpy()
    count, generator = min(frozen.shape), np.random.default_rng(0)
    x, y = (
        generator.normal(size=(20, frozen.shape[1])),
        generator.normal(size=(20, frozen.shape[0])),
    )
    bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.detach().double().numpy()
    for period in range(3):
        chosen = directions(
            config.selection, count, config.r, spec.seed, period, layer.name
        ).numpy()
        a, b = by_definition(frozen, chosen, config.gauge)
        frozen = frozen - b @ a
        for _ in range(4):
            slope = ((x @ (frozen + b @ a).T + bias - y).T @ x) / len(x)
            a, b = a - rate * b.T @ slope, b - rate * slope @ a.T
            loss = ((layer(torch.tensor(x).float()) - torch.tensor(y).float()) ** 2).sum() / (
                2 * len(x)
            )
            loss.backward()
            for each in (layer.lora_A, layer.lora_B):
                each.data.sub_(rate * each.grad)
                each.grad = None
        np.testing.assert_allclose(effective(model)[layer.name].numpy(), frozen + b @ a, atol=2e-4)
        np.testing.assert_allclose(layer.lora_A.detach().numpy(), a, atol=2e-3)
        frozen = frozen + b @ a
        if period < 2:
            resample(model, spec)


@both
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gauge": "code"},
        {"selection": "top"},
        {"selection": "bottom"},
        {"r": 32},
    ],  # k_proj has 32 directions: all of them
    ids=str,
)
def test_three_periods_follow_the_equations(name: str, changes: dict[str, Any]) -> None:
    follows_the_equations(name, changes)


def test_the_equations_are_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rosa, "factors", lambda weight, chosen, _: factors(weight, chosen, "code"))
    broken(follows_the_equations, MINIATURES[1], {})
    monkeypatch.undo()
    monkeypatch.setattr(RosaLinear, "next_period", not_merged)
    broken(follows_the_equations, MINIATURES[1], {})


@both
def test_all_directions_leave_nothing_frozen(name: str) -> None:
    """S9: with R = min(in, out) W_f is zero but for rounding, and the model is still its base."""
    targets = ("c_attn",) if "gpt2" in name else ("q_proj",)
    spec = spec_with(name, r=64, target_modules=targets)
    model, weights = make(spec).model, originals(spec)
    for layer in method.layers_of(model):
        assert layer.base_layer.weight.norm() < 1e-5 * weights[layer.name].norm()
    assert_close(logits(model), logits(load(spec, None)), 1e-5)
    resample(stir(model), spec)
    assert_close(logits(model), logits(stir(make(spec).model)), 1e-5)


def is_the_principal_part(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for layer in method.layers_of(model):
        assert_close(
            product(layer.lora_A, layer.lora_B), expected[layer.name], 1e-5, what=layer.name
        )


@both
def test_the_top_directions_once_are_pissas(name: str) -> None:
    """S10: B A, whatever the gauge, as PEFT's PiSSA begins."""
    import peft

    base = load(spec_of(name), None)
    settings = peft.LoraConfig(
        r=8,
        lora_alpha=8,
        init_lora_weights="pissa",
        target_modules=list(linear_layers(base)),
        fan_in_fan_out="gpt2" in name,
    )
    pissa = peft.get_peft_model(base, settings)
    expected = {
        each.removeprefix("base_model.model."): product(
            own.lora_A["default"].weight, own.lora_B["default"].weight
        )
        for each, own in pissa.named_modules()
        if hasattr(own, "lora_A")
    }
    is_the_principal_part(make(spec_with(name, selection="top")).model, expected)
    is_the_principal_part(make(spec_with(name, selection="top", gauge="code")).model, expected)
    broken(is_the_principal_part, make(spec_with(name)).model, expected)


def rank_is_between(model: nn.Module, spec: RunSpec, least: int, most: int) -> None:
    before = originals(spec)
    for name, weight in effective(model).items():
        ranks = torch.linalg.svdvals(weight - before[name])
        rank = int((ranks > 1e-4 * ranks[0]).sum())
        assert least < rank <= most, f"{name}: {rank}"


@both
def test_the_rank_of_what_is_learned_grows_with_the_periods(name: str) -> None:
    """S7: more than R after two periods, at most 2 R T."""
    spec = spec_with(name, r=2)
    for periods in (1, 2, 4):
        rank_is_between(after(spec, periods), spec, 2 if periods > 1 else 1, 4 * periods)
    broken(rank_is_between, after(spec, 4), spec, 2, 15)
    broken(rank_is_between, after(spec, 1), spec, 4, 8)


# --- precision

PERIODS = 10


def drifts(spec: RunSpec) -> tuple[list[float], list[float]]:
    """After each period, how far the sum in float32, and the stored weight, are from W_f as float64
    gives it from W and all factors.

    The first relative to W, the second to W_f, which grows.
    """
    model, of, stored = make(spec).model, originals(spec), []
    exact: list[float] = []
    for period in range(PERIODS):
        if period:
            resample(model, spec)
        stir(model, seed=period)
        layer = method.layers_of(model)[0]
        weight, learned = of[layer.name], product(*layer.as_lora())
        frozen = layer.frozen(layer.base_layer.weight.detach()).double()
        wanted = weight + learned - product(layer.lora_A, layer.lora_B)
        exact.append(float((frozen - wanted).norm() / weight.norm()))
        stored.append(
            float((effective(model)[layer.name] - weight - learned).norm() / wanted.norm())
        )
    return exact, stored


def errors_do_not_grow(spec: RunSpec) -> None:
    """The sum within 1e-6 after ten periods; what is stored in bfloat16 as near as after the
    first.
    """
    exact, stored = drifts(spec)
    assert max(exact) < 1e-6, exact
    limit = 1e-6 if spec.model.dtype == "float32" else 2e-3
    assert 0 < max(stored) < limit, stored
    if spec.model.dtype != "float32":
        assert stored[-1] < 1.1 * stored[0], stored


def without_the_copy(layer: RosaLinear, period: Any, dtype: torch.dtype) -> Any:
    """A mutant: the weight itself is the sum, whatever its dtype."""
    stored = AS_STORED(layer, period, dtype)
    layer.exact = None
    return stored


AS_STORED = RosaLinear.as_stored


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_do_not_grow_with_the_periods(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_with(name, dtype, target_modules=("c_attn",) if "gpt2" in name else ("v_proj",))
    errors_do_not_grow(spec)
    if dtype == "bfloat16":
        monkeypatch.setattr(RosaLinear, "as_stored", without_the_copy)
        broken(errors_do_not_grow, spec)


@both
def test_a_base_in_bfloat16_begins_as_near_to_itself_as_rounding_puts_it(name: str) -> None:
    """Rounding W_f moves the logits no further than twice what rounding W does."""
    half, single = spec_with(name, "bfloat16"), spec_with(name)
    rounded, exact = (logits(load(each, None)) for each in (half, single))
    assert_close(
        logits(make(half).model), rounded, 2 * float((rounded - exact).norm() / rounded.norm())
    )
    (layer, *_) = method.layers_of(make(half).model)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert (
        layer(torch.randn(2, layer.lora_A.shape[1], dtype=torch.bfloat16)).dtype == torch.bfloat16
    )


# --- what a checkpoint keeps, and what is exported


def is_taken_up(model: nn.Module, spec: RunSpec) -> None:
    """W_f, the history and the factors at the beginning of the period, to the last bit, through
    a file; and so is the next resample.
    """
    again = make(spec).model
    method.load_state(again, through_a_file(method.state(model)))
    for one, other in zip(method.layers_of(model), method.layers_of(again), strict=True):
        other.lora_A.data.copy_(one.lora_A)  # the engine's part
        other.lora_B.data.copy_(one.lora_B)
    whole = copy.deepcopy(model)
    for _ in range(2):
        assert images(whole.named_parameters()) == images(again.named_parameters())
        for one, other in zip(method.layers_of(whole), method.layers_of(again), strict=True):
            assert (one.exact is None) is (other.exact is None)
            assert one.exact is None or torch.equal(one.exact, other.exact)
            assert all(
                torch.equal(*pair) for pair in zip(one.as_lora(), other.as_lora(), strict=True)
            )
        resample(whole, spec)
        resample(again, spec)


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def in_another_order(layer: RosaLinear, first: Tensor, _: Factors) -> Any:
    """A mutant: what was learned is summed before it is added."""
    assert layer.start is not None
    learned = sum(end.b @ end.a - start.b @ start.a for start, end in layer.history)
    whole = first + product(*layer.history[0].start).float() + learned
    return rosa.subtract(whole, layer.start)


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_gives_the_same_bits_again(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_with(name, dtype)
    for periods in (1, 3):
        is_taken_up(after(spec, periods), spec)
    monkeypatch.setattr(RosaLinear, "replay", in_another_order)
    broken(is_taken_up, after(spec, 3), spec)


def test_singular_vectors_that_came_out_otherwise_are_put_back() -> None:
    """As on another machine; here another seed's, so that nothing is nearly right."""
    spec = spec_with(MINIATURES[0])
    model, other = after(spec, 3), make(spec).model
    for layer in method.layers_of(other):
        layer.seed += 1
        weight, first = layer.base_layer.weight, layer.start
        period = layer.next_period(layer.frozen(weight) + first.b @ first.a, None)
        weight.data.copy_(layer.as_stored(period, weight.dtype)[0])
        layer.start = period.start.copy()
        assert not torch.equal(layer.start.a, first.a)
    method.load_state(other, method.state(model))
    for mine, theirs in zip(method.layers_of(other), method.layers_of(model), strict=True):
        assert_close(mine.base_layer.weight, theirs.base_layer.weight, 1e-6)


def exported(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    method.export(model, folder)
    return folder


def is_one_lora(model: nn.Module, spec: RunSpec, folder: Path, periods: int) -> None:
    """S8: PEFT alone, on the untouched base, gives the logits; rank 2 R T, scale 1."""
    import peft

    again = peft.PeftModel.from_pretrained(load(spec, None), folder)
    assert_close(logits(again.eval()), logits(model.eval()), 1e-5)
    values = json.loads((folder / "adapter_config.json").read_text())
    assert (
        values["r"] == values["lora_alpha"] == 2 * spec.adapter.config.r * periods
        and not values["use_rslora"]
    )
    merged = linear_layers(again.merge_and_unload())
    for name, weight in effective(model).items():
        layer = merged[name]
        assert_close(
            (layer.weight.T if is_conv1d(layer) else layer.weight).detach().double(),
            weight,
            1e-6,
            what=name,
        )


@both
@pytest.mark.parametrize(
    "periods", [1, 3, 6]
)  # of rank 16, 48, and 96: more than the layers' 64 and 32
def test_all_periods_are_one_lora_on_the_original_base(
    name: str, periods: int, tmp_path: Path
) -> None:
    spec = spec_with(name)
    model = after(spec, periods)
    is_one_lora(model, spec, exported(model, tmp_path / "whole"), periods)
    if periods == 3:
        forgetful = copy.deepcopy(model)
        for layer in method.layers_of(forgetful):
            layer.history.pop(0)
        broken(is_one_lora, model, spec, exported(forgetful, tmp_path / "forgetful"), periods)
        unmoved = copy.deepcopy(model)
        for layer in method.layers_of(unmoved):
            layer.start = Factors(layer.start.a, -layer.start.b)
        broken(is_one_lora, model, spec, exported(unmoved, tmp_path / "unmoved"), periods)


# --- the layer, the settings, what is refused


def test_the_slopes_are_those_of_finite_differences() -> None:
    base = nn.Linear(5, 3).requires_grad_(False)
    layer = RosaLinear(base, "layer", 2, "random", "sqrt", 0)
    start = layer.next_period(layer.frozen(base.weight), None).start
    layer.lora_A.data, layer.lora_B.data = start.a, start.b
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    layer.double()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.lora_A, layer.lora_B))
    layer(x).sum().backward()
    assert (
        layer.lora_A.grad.any() and layer.lora_B.grad.any() and base.weight.grad is None
    )  # G5: both, at once


class Counting(Bare):
    """Counts the resamples, and makes none."""

    @property
    def model(self) -> Any:
        raise RuntimeError("resampled")

    @model.setter
    def model(self, model: nn.Module) -> None:
        pass


@pytest.mark.parametrize(
    ("steps", "every", "after_steps"),
    [
        (5, 2, [1, 3]),
        (4, 2, [1]),
        (6, 3, [2]),
        (7, 3, [2, 5]),
        (3, 3, []),
        (2, 9, []),
        (3, 1, [0, 1]),
        (1, 1, []),
    ],
)
def test_a_period_is_so_many_steps_and_none_begins_after_the_last(
    steps: int, every: int, after_steps: list[int]
) -> None:
    """S3: ceil(steps / K) factorizations, the first of them before step 0."""
    config = spec_with(MINIATURES[0], resample_every=every).adapter.config
    found = []
    for step in range(steps):
        try:
            method.after_step(Counting(nn.Module()), config, step, steps)
        except RuntimeError:
            found.append(step)
    assert found == after_steps and len(found) + 1 == -(-steps // every)


def test_every_moment_of_the_factors_is_reset_and_of_nothing_else() -> None:
    spec = spec_with(MINIATURES[0])
    model = make(spec).model
    handle = Bare(model)
    method.after_step(handle, spec.adapter.config, spec.adapter.config.resample_every - 1, FOREVER)
    (reset,) = handle.reset
    assert {id(each) for each in reset} == {
        id(each) for each in model.parameters() if each.requires_grad
    }


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("r", 0),
        ("resample_every", 0),
        ("selection", "middle"),
        ("gauge", "svd"),
        ("resample_every", 1.5),
        ("gauge", None),
    ],
)
def test_a_setting_that_means_nothing_is_refused(setting: str, value: Any) -> None:
    values = dataclasses.asdict(reader.adapter("rosa_r8").config) | {setting: value}
    with pytest.raises(UsageError, match=rf"^adapters\.x\.{setting}: [^\n]*$"):
        build(method.Config, values, "adapters.x")


def test_what_cannot_run_is_refused_with_its_reason() -> None:
    spec = spec_with(MINIATURES[1])
    config, none = spec.adapter.config, spec.quantizer
    for quantizer in ("int8", "nf4", "icq"):
        reason = method.supports(spec.model, reader.quantizer(quantizer, "float32"), 0, config)
        assert reason == f"ROSA on {quantizer}: it needs the dense weight at every resample"
    assert method.supports(spec.model, none, 0, config) is None
    wide = dataclasses.replace(config, r=33)  # grouped keys have 32
    assert "rank 33 is more than" in method.supports(spec.model, none, 0, wide)
    assert "named c_attn" in method.supports(
        spec.model, none, 0, dataclasses.replace(config, target_modules=("c_attn",))
    )
