"""LoRA's settings: rsLoRA's scale, DoRA's magnitude and its gradients against NumPy, DoRA on
rounded weights, what is refused.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import (
    MINIATURES,
    all_logits,
    answer_log_likelihood,
    assert_close,
    assert_same_gradients,
    broken,
    gradients,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
)
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.compatibility import refusal
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import UsageError
from finrepro.kinds import kind_module, optimizer_of
from finrepro.methods.adapters import lora
from finrepro.methods.layers.linear import is_conv1d, linear_layers
from finrepro.models.build import configuration, load
from finrepro.settings import Choice, build
from finrepro.sizes.shapes import dense_sizes, depth

IDS = tuple(random_examples(11, count=1, longest=30)[0].ids) * 3
GPT2, LLAMA = MINIATURES
both = pytest.mark.parametrize("name", MINIATURES)


def settings(**changes: Any) -> Choice:
    """lora_r8 with other settings."""
    config = dataclasses.asdict(reader.adapter("lora_r8").config)
    return Choice(name="changed", kind="lora", config=lora.Config(**config | changes))


def adapted(model: nn.Module) -> dict[str, Any]:
    """Name -> PEFT's layer."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return all_logits(model.eval(), IDS)


def trajectory(spec: RunSpec) -> dict[str, Tensor]:
    """The adapter's parameters after three steps."""
    model = make(spec).model
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = optimizer_of(spec.train.optimizer).build(named, 1e-2)
    for step in range(3):
        (-answer_log_likelihood(model, random_examples(step, count=1)[0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in named}


@both
def test_rslora_is_scaled_by_alpha_over_the_root_of_r_and_says_so(
    name: str, tmp_path: Path
) -> None:
    spec = spec_of(name, "rslora_r8")
    model = make(spec).model
    scales = [layer.scaling["default"] for layer in adapted(model).values()]
    np.testing.assert_allclose(scales, 16 / np.sqrt(8), rtol=1e-12)
    lora.export(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["use_rslora"] is True and (written["r"], written["lora_alpha"]) == (8, 16)


@both
def test_rslora_is_lora_with_alpha_times_the_root_of_r(name: str) -> None:
    """At r 4 the root is exact: every bit of the trajectory is the same."""
    one = trajectory(spec_of(name, settings(r=4, lora_alpha=8, use_rslora=True)))
    same = trajectory(spec_of(name, settings(r=4, lora_alpha=16)))
    assert one.keys() == same.keys() and all(torch.equal(one[each], same[each]) for each in one)
    other = trajectory(spec_of(name, settings(r=4, lora_alpha=8)))
    assert not all(torch.equal(one[each], other[each]) for each in one)


@both
def test_a_merged_update_has_the_rank_and_the_scale_of_the_unmerged_one(name: str) -> None:
    spec = spec_of(name, "rslora_r8")
    model: Any = stir(make(spec).model)
    before, factors = linear_layers(load(spec, None)), adapted(model)
    merged = linear_layers(copy.deepcopy(model).merge_and_unload())
    for each, layer in merged.items():
        delta = (layer.weight - before[each].weight).detach()
        own = factors[f"base_model.model.{each}"]
        product = (
            own.scaling["default"] * own.lora_B["default"].weight @ own.lora_A["default"].weight
        )
        assert_close(delta, product.T if is_conv1d(layer) else product, 1e-4, what=each)
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 8


# DoRA on one layer, in float64, against NumPy.


@dataclasses.dataclass
class Layer:
    """A DoRA layer away from its beginning: W as (out, in), b, its trained tensors, an input and
    the output's gradient.
    """

    module: Any
    weight: np.ndarray
    bias: np.ndarray
    a: np.ndarray
    b: np.ndarray
    m: np.ndarray
    x: np.ndarray
    slope: np.ndarray

    @property
    def direction(self) -> np.ndarray:
        return self.weight + 2.0 * self.b @ self.a

    @property
    def length(self) -> np.ndarray:
        return np.linalg.norm(self.direction, axis=1, keepdims=True)

    @property
    def whole(self) -> np.ndarray:
        """W' (arXiv 2402.09353, equation 5)."""
        return self.m[:, None] * self.direction / self.length


def dora_layer(name: str, **changes: Any) -> Layer:
    model = stir(make(spec_of(name, settings(use_dora=True, **changes))).model)
    module = next(iter(adapted(model).values())).double()
    base = module.base_layer
    weight = base.weight.T if is_conv1d(base) else base.weight
    outputs, inputs = weight.shape
    values = [
        weight,
        torch.zeros(outputs) if base.bias is None else base.bias,
        module.lora_A["default"].weight,
        module.lora_B["default"].weight,
        module.lora_magnitude_vector["default"].weight,
    ]
    generator = np.random.default_rng(0)
    drawn = generator.normal(size=(7, inputs)), generator.normal(size=(7, outputs))
    return Layer(module, *(each.detach().double().numpy() for each in values), *drawn)


def output(layer: Layer) -> np.ndarray:
    return layer.module(torch.from_numpy(layer.x)).detach().numpy()


@both
def test_doras_output_is_that_of_the_rewritten_weight(name: str) -> None:
    layer = dora_layer(name)
    np.testing.assert_allclose(
        output(layer), layer.x @ layer.whole.T + layer.bias, rtol=1e-9, atol=1e-9
    )


@both
def test_doras_gradients_leave_the_norm_alone(name: str) -> None:
    """Section 4.3: the norm is a constant. With W'-gradient G = slope^T x: dm = <G, V / ||V||>,
    dV = m / ||V|| G without a projection.
    """
    layer = dora_layer(name)
    layer.module(torch.from_numpy(layer.x)).backward(torch.from_numpy(layer.slope))
    found = {
        "a": layer.module.lora_A["default"].weight.grad.numpy(),
        "b": layer.module.lora_B["default"].weight.grad.numpy(),
        "m": layer.module.lora_magnitude_vector["default"].weight.grad.numpy(),
    }
    unit, gradient = layer.direction / layer.length, layer.slope.T @ layer.x
    along = (gradient * unit).sum(1)
    np.testing.assert_allclose(found["m"], along, rtol=1e-9, atol=1e-9)
    detached = layer.m[:, None] / layer.length * gradient
    np.testing.assert_allclose(found["b"], 2.0 * detached @ layer.a.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found["a"], 2.0 * layer.b.T @ detached, rtol=1e-9, atol=1e-9)
    projected = layer.m[:, None] / layer.length * (gradient - along[:, None] * unit)
    assert not np.allclose(found["b"], 2.0 * projected @ layer.a.T, rtol=1e-3)


@both
def test_doubling_the_magnitude_doubles_the_output_but_not_the_bias(name: str) -> None:
    layer = dora_layer(name)
    before = output(layer) - layer.bias
    with torch.no_grad():
        layer.module.lora_magnitude_vector["default"].weight.mul_(2)
    np.testing.assert_allclose(output(layer) - layer.bias, 2 * before, rtol=1e-9, atol=1e-9)


@both
def test_doras_dropout_drops_in_training_alone(name: str) -> None:
    plain, dropping = dora_layer(name), dora_layer(name, lora_dropout=0.5)
    for layer in (plain, dropping):
        layer.module.eval()
    np.testing.assert_allclose(output(dropping), output(plain), rtol=1e-9, atol=1e-9)
    dropping.module.train()
    assert not np.allclose(output(dropping), output(plain), rtol=1e-3)


@both
def test_merged_rows_are_as_long_as_the_magnitudes_and_unmerging_restores_the_weight(
    name: str,
) -> None:
    """Unmerging a Conv1D was wrong in earlier versions of PEFT (huggingface/peft #3531). Nothing
    here unmerges.
    """
    layer = dora_layer(name)
    base = layer.module.base_layer
    layer.module.merge()
    merged = base.weight.T if is_conv1d(base) else base.weight
    np.testing.assert_allclose(
        np.linalg.norm(merged.detach().numpy(), axis=1), np.abs(layer.m), rtol=1e-9
    )
    np.testing.assert_allclose(merged.detach().numpy(), layer.whole, rtol=1e-9, atol=1e-9)
    layer.module.unmerge()
    restored = base.weight.T if is_conv1d(base) else base.weight
    np.testing.assert_allclose(restored.detach().numpy(), layer.weight, rtol=1e-9, atol=1e-9)


def with_the_rounded_weights(spec: RunSpec) -> nn.Module:
    """The cell's adapter on a base in full precision whose weights are what the quantizer makes
    of them.
    """
    quantizer = kind_module("quantizers", spec.quantizer.kind)
    plain = load(
        dataclasses.replace(spec, quantizer=reader.quantizer("none", spec.model.dtype)), None
    )
    with torch.no_grad():
        for layer in linear_layers(plain).values():
            weight = layer.weight.T.contiguous() if is_conv1d(layer) else layer.weight
            rounded = quantizer.decode(quantizer.encode(weight.detach(), spec.quantizer.config)).to(
                weight
            )
            layer.weight.copy_(rounded.T if is_conv1d(layer) else rounded)
    return lora.apply(plain.requires_grad_(False).train(), spec.adapter.config, spec.seed)


def computes_alike(model: nn.Module, reference: nn.Module) -> None:
    """The same logits and the same gradients."""
    found = []
    for each in (model, reference):
        with torch.no_grad():
            outputs = all_logits(each, IDS)
        answer_log_likelihood(each, random_examples(0, count=1)[0]).backward()
        found.append((outputs, gradients(each)))
    assert_close(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1], 1e-4)


@both
@pytest.mark.parametrize("quantizer", ["nf4", pytest.param("fp4", marks=pytest.mark.slow)])
def test_dora_on_rounded_weights_is_dora_on_those_weights(name: str, quantizer: str) -> None:
    spec = spec_of(name, "dora_r8", quantizer)
    computes_alike(stir(make(spec).model), stir(with_the_rounded_weights(spec)))
    broken(computes_alike, stir(make(spec).model), stir(make(spec_of(name, "dora_r8")).model))


def rescales_its_base(layer: Any, weight: Tensor) -> None:
    """y = m / ||V|| (W x + s B A x) + b, with W x as the base computes it and the norm that of
    the weight as stored.
    """
    base, factors = (
        layer.base_layer,
        (layer.lora_A["default"].weight, layer.lora_B["default"].weight),
    )
    x = torch.randn((5, weight.shape[1]), generator=torch.Generator().manual_seed(0))
    bias = 0 if base.bias is None else base.bias
    scale = layer.lora_magnitude_vector["default"].weight / (
        weight + 2.0 * factors[1] @ factors[0]
    ).norm(dim=1)
    expected = scale * (base(x) - bias + 2.0 * x @ factors[0].T @ factors[1].T) + bias
    assert_close(layer(x), expected)


@both
def test_dora_on_int8_takes_the_norm_of_the_weights_as_stored(name: str) -> None:
    """LLM.int8 also rounds what goes in, so that its own product with W is what is scaled."""
    spec = spec_of(name, "dora_r8", "int8")
    model, plain = (
        stir(make(spec).model),
        linear_layers(with_the_rounded_weights(spec).base_model.model),
    )
    for each, layer in adapted(model).items():
        base = plain[each.removeprefix("base_model.model.") + ".base_layer"]
        weight = base.weight.T if is_conv1d(base) else base.weight
        rescales_its_base(layer, weight)
        broken(rescales_its_base, layer, 1.01 * weight)


# What cannot be.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": 0}, "adapters.x.r: Input should be greater than 0"),
        ({"lora_alpha": 0}, "adapters.x.lora_alpha: Input should be greater than 0"),
        ({"lora_dropout": 1.0}, "adapters.x.lora_dropout: Input should be less than 1"),
        (
            {"lora_dropout": -0.1},
            "adapters.x.lora_dropout: Input should be greater than or equal to 0",
        ),
        ({"use_dora": "yes"}, "adapters.x.use_dora: Input should be a valid boolean"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_they_are_read(
    change: dict[str, Any], says: str
) -> None:
    values = dataclasses.asdict(reader.adapter("lora_r8").config) | change
    with pytest.raises(UsageError) as error:
        build(lora.Config, values, "adapters.x")
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_what_does_not_fit_the_model_is_refused_before_anything_is_loaded() -> None:
    model = reader.model("llama3_1_8b")  # k_proj and v_proj have fewer outputs: grouped queries
    for changes, says in [
        (
            {"r": 1025},
            "rank 1025 is more than llama3_1_8b can have in self_attn.k_proj, 4096 in and 1024 out",
        ),
        (
            {"target_modules": ("q_proj", "c_attn")},
            "no linear layer of the model is named c_attn; "
            "there are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (
            {"target_modules": ()},
            "no linear layer of the model is named anything; there are down_proj",
        ),
    ]:
        spec = spec_of(model, settings(**changes))
        reason = refusal(spec)
        assert reason is not None and reason.startswith(says) and "\n" not in reason
        assert lora.trainable_parameters(model, spec.adapter.config) >= 0
    assert refusal(spec_of(model, settings(r=1024))) is None
    assert refusal(spec_of(model, settings(r=4096, target_modules=("q_proj", "down_proj")))) is None


def test_dora_is_refused_where_the_base_is_in_parts() -> None:
    assert refusal(spec_of(GPT2, "dora_r8", zero_stage=2)) is None
    reason = refusal(spec_of(GPT2, "dora_r8", zero_stage=3))
    assert reason == "DoRA reads the base's weights, which ZeRO-3 keeps in parts"


def test_named_targets_alone_are_counted() -> None:
    model, config = (
        reader.model("llama3_1_8b"),
        settings(target_modules=("q_proj", "k_proj"), use_dora=True).config,
    )
    assert lora.trainable_parameters(model, config) == 32 * (
        8 * (4096 + 4096 + 4096 + 1024) + 4096 + 1024
    )


@pytest.mark.parametrize("name", list(reader.entries("models")))
def test_the_sizes_of_the_layers_are_those_of_the_model(name: str) -> None:
    from transformers import AutoModelForCausalLM

    entry = reader.model(name)
    with torch.device("meta"):
        layers = linear_layers(AutoModelForCausalLM.from_config(configuration(entry)))
    sizes = dense_sizes(entry)
    assert len(layers) == depth(entry) * len(sizes)
    for each, layer in layers.items():
        inside = ".".join(each.split(".")[-2:])
        shape = tuple(layer.weight.shape) if is_conv1d(layer) else tuple(layer.weight.shape)[::-1]
        assert sizes[inside] == shape
