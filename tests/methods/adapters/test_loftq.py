"""LoftQ: its iteration against NumPy, PEFT's numbers, the error that it leaves, and what it
refuses.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import MINIATURES, assert_close, broken, images, make, process, spec_of  # noqa: F401
from test_before_quantization import decaying, upright
from torch import Tensor

from finrepro.catalogue import reader
from finrepro.catalogue.compatibility import refusal
from finrepro.errors import UsageError
from finrepro.kinds import kind_module
from finrepro.methods.adapters import loftq, lora
from finrepro.methods.layers.linear import linear_layers
from finrepro.models.build import load
from finrepro.settings import Choice, build

GPT2, LLAMA = MINIATURES
FOUR_BITS = ("nf4", "nf4_single", "fp4", "icq", "icq_mse")
searching = [
    pytest.param(each, marks=pytest.mark.slow) if "icq" in each else each for each in FOUR_BITS
]


def settings(**changes: Any) -> loftq.Config:
    """loftq_r8's with other values."""
    return loftq.Config(**dataclasses.asdict(reader.adapter("loftq_r8").config) | changes)


def rounding(name: str) -> Callable[[Tensor], Tensor]:
    """Decode after encode of a catalogue entry."""
    choice = reader.quantizer(name, "float32")
    module = kind_module("quantizers", choice.kind)
    return lambda matrix: module.decode(module.encode(matrix.contiguous(), choice.config))


def coarse(matrix: Tensor) -> Tensor:
    """A quantizer without a library: to whole multiples of a sixteenth of the largest magnitude."""
    step = matrix.abs().max() / 16
    return (matrix / step).round() * step


def reference(weight: np.ndarray, r: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 with the coarse quantizer, in double precision: Q_T, and A_T B_T as one
    matrix.
    """
    product = np.zeros_like(weight)
    for _ in range(iterations):
        target = weight - product
        step = np.abs(target).max() / 16
        rounded = np.round(target / step) * step
        u, s, vh = np.linalg.svd(weight - rounded, full_matrices=False)
        product = (u[:, :r] * s[:r]) @ vh[:r]
    return rounded, product


def is_algorithm_1(
    target: Tensor, state: dict[str, Tensor], weight: Tensor, r: int, iterations: int
) -> None:
    """What the layer stores, and what is added to it."""
    rounded, product = reference(weight.double().numpy(), r, iterations)
    assert_close(coarse(target), torch.from_numpy(rounded), 1e-4)
    assert_close(state["lora_B"] @ state["lora_A"], torch.from_numpy(product), 1e-3)
    assert_close(state["lora_A"] @ state["lora_A"].T, state["lora_B"].T @ state["lora_B"], 1e-4)


@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_it_is_the_papers_iteration(shape: tuple[int, int], iterations: int) -> None:
    weight = decaying(*shape)
    config = settings(r=4, lora_alpha=4, loftq_iter=iterations)
    target, state = loftq.prepare("x", weight, coarse, config, 0)
    is_algorithm_1(target, state, weight, 4, iterations)
    broken(is_algorithm_1, target, state, weight, 4, iterations + 1)
    broken(is_algorithm_1, weight - target, state, weight, 4, iterations)


@pytest.mark.parametrize("r", [4, 8])
def test_after_one_iteration_it_has_pefts_numbers(r: int) -> None:
    """What `replace_lora_weights_loftq` computes of a layer, but for its devices: it knows no
    CPU.
    """
    from peft.utils.loftq_utils import _low_rank_decomposition

    weight, quantized = decaying(96, 64), rounding("nf4_single")
    theirs = _low_rank_decomposition(weight - quantized(weight), reduced_rank=r)
    target, state = loftq.prepare(
        "x", weight, quantized, settings(r=r, lora_alpha=r, loftq_iter=1), 0
    )
    assert torch.equal(target, weight)
    assert_close(state["lora_B"] @ state["lora_A"], theirs["L"] @ theirs["R"], 1e-4)
    assert_close(state["lora_A"].abs(), theirs["R"].abs(), 1e-4)


def error(weight: Tensor, quantized: Callable[[Tensor], Tensor], iterations: int) -> float:
    """||W - Q_T - B A||."""
    if not iterations:
        return float((weight - quantized(weight)).norm())
    target, state = loftq.prepare("x", weight, quantized, settings(loftq_iter=iterations), 0)
    return float((weight - quantized(target) - state["lora_B"] @ state["lora_A"]).norm())


def never_rises(errors: list[float]) -> None:
    """Less than plain rounding's after the first iteration, and never more than a hundredth
    above the one before.
    """
    assert errors[1] < 0.99 * errors[0]
    assert all(later <= 1.01 * earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("quantizer", searching)
@pytest.mark.parametrize("weights", ["decaying", "normal"])
def test_the_error_is_less_than_roundings_and_does_not_rise(quantizer: str, weights: str) -> None:
    normal = torch.randn(128, 192, generator=torch.Generator().manual_seed(0))
    weight = decaying(128, 192) if weights == "decaying" else normal
    errors = [error(weight, rounding(quantizer), iterations) for iterations in range(6)]
    never_rises(errors)
    broken(never_rises, [errors[0], errors[0], *errors[2:]])
    broken(never_rises, [*errors, 1.02 * errors[-1]])


def stores_what_was_compensated(model: Any, dense: Any, choice: Choice) -> None:
    """In every layer codes and factors are the last iteration's; without a second quantization
    rounding the base again moves no code.
    """
    module, quantized = kind_module("quantizers", choice.kind), rounding(choice.name)
    for name, layer in linear_layers(dense).items():
        weight = upright(layer).contiguous()
        target, state = loftq.prepare(name, weight, quantized, settings(), 0)
        own = model.get_submodule(f"{lora.PREFIX}{name}")
        for key in ("lora_A", "lora_B"):
            assert torch.equal(getattr(own, key).default.weight, state[key]), name
        stored = module.encode(target, choice.config)
        assert images([("w", own.base_layer.weight)])["w"] == images([("w", stored.codes)])["w"], (
            name
        )
        if not choice.config.double_quant:
            assert torch.equal(
                module.encode(module.decode(stored), choice.config).codes, stored.codes
            ), name


@pytest.mark.parametrize("name", MINIATURES)
@pytest.mark.parametrize("quantizer", ["nf4_single", pytest.param("fp4", marks=pytest.mark.slow)])
def test_the_base_and_the_factors_are_the_last_iterations(name: str, quantizer: str) -> None:
    spec = spec_of(name, "loftq_r8", quantizer)
    stores_what_was_compensated(make(spec).model, load(spec, None), spec.quantizer)
    one = Choice(name="one", kind="loftq", config=settings(loftq_iter=1))
    broken(
        stores_what_was_compensated,
        make(spec_of(name, one, quantizer)).model,
        load(spec, None),
        spec.quantizer,
    )


def test_in_bfloat16_the_rounding_of_the_dtype_is_compensated_with_the_rest() -> None:
    """The factors belong to the weights as they are stored: nearer than factors of a base that
    was rounded in float32 only.
    """
    half = dataclasses.replace(spec_of(LLAMA).model, dtype="bfloat16")
    spec = spec_of(half, "loftq_r8", "nf4_single")
    model, dense = make(spec).model, load(spec, None)
    for name, layer in linear_layers(dense).items():
        own, weight = model.get_submodule(f"{lora.PREFIX}{name}"), upright(layer)
        update = own.lora_B.default.weight.detach() @ own.lora_A.default.weight.detach()  # type: ignore
        eye = torch.eye(weight.shape[1], dtype=torch.bfloat16)
        stored = own.base_layer(eye).T.float()  # type: ignore
        plain = (weight.float() - rounding("nf4_single")(weight).float()).norm()
        assert (weight.float() - stored - update).norm() < 0.9 * plain, name


# What cannot be.


@pytest.mark.parametrize("alpha", [16, 4])
def test_a_scaling_that_is_not_one_is_refused_when_it_is_read(alpha: int) -> None:
    values = dataclasses.asdict(settings()) | {"lora_alpha": alpha}
    with pytest.raises(UsageError) as raised:
        build(loftq.Config, values, "adapters.x")
    line = str(raised.value)
    assert (
        "scaling must be 1" in line and f"lora_alpha is {alpha}, it has to be r, which is 8" in line
    )
    assert "\n" not in line


@pytest.mark.parametrize(
    ("key", "value"), [("loftq_iter", 0), ("r", 0), ("svd_niter", -1), ("lora_dropout", 0.1)]
)
def test_other_settings_that_cannot_be_are_refused(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=r"^adapters\.x[^\n]*$"):
        build(loftq.Config, dataclasses.asdict(settings()) | {key: value}, "adapters.x")


def test_what_leaves_nothing_to_compensate_is_refused_by_name() -> None:
    model = reader.model("llama3_1_8b")
    why = "LoftQ makes up for what a quantizer takes from the weights"
    refusals = {
        "none": f"{why}; none takes nothing",
        "int8": f"{why}; int8 rounds every input as well",
    }
    assert {name: refusal(spec_of(model, "loftq_r8", name)) for name in refusals} == refusals
    assert all(refusal(spec_of(model, "loftq_r8", each)) is None for each in FOUR_BITS)
    few = Choice(name="few", kind="loftq", config=settings(r=1025, lora_alpha=1025))
    reason = refusal(spec_of(model, few, "nf4"))
    assert reason is not None and reason.startswith("rank 1025 is more than llama3_1_8b can have")
