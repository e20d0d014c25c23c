"""PiSSA: its factors and what they leave, against NumPy and PEFT; what rounding costs beside it;
its exported change.
"""

import dataclasses
import json
from collections.abc import Callable
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
    broken,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
)
from safetensors.torch import load_file
from test_before_quantization import decaying, upright
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.compatibility import refusal
from finrepro.errors import UsageError
from finrepro.kinds import kind_module
from finrepro.methods.adapters import lora, pissa
from finrepro.methods.layers.linear import is_conv1d, linear_layers
from finrepro.models.build import load
from finrepro.settings import Choice, build

GPT2, LLAMA = MINIATURES
both = pytest.mark.parametrize("name", MINIATURES)
IDS = random_examples(11, count=1, longest=30)[0].ids


def settings(**changes: Any) -> Choice:
    """pissa_r8 with other settings."""
    values = dataclasses.asdict(reader.adapter("pissa_r8").config)
    return Choice(name="changed", kind="pissa", config=pissa.Config(**values | changes))


def prepared(weight: Tensor, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """W_res, A, B."""
    rest, state = pissa.prepare("x", weight, lambda matrix: matrix, settings(**changes).config, 0)
    return rest, state["lora_A"], state["lora_B"]


def splits_the_weight(rest: Tensor, a: Tensor, b: Tensor, weight: Tensor, scale: float) -> None:
    """W_res + s B A = W; A A^T = B^T B = S_r / s; |W_res|^2 is the sum of the other singular
    values' squares.
    """
    r = len(a)
    s = torch.from_numpy(np.linalg.svd(weight.double().numpy(), compute_uv=False))
    assert_close(rest + scale * b @ a, weight, 1e-5)
    assert_close(a @ a.T, torch.diag(s[:r]) / scale, 1e-5)
    assert_close(b.T @ b, torch.diag(s[:r]) / scale, 1e-5)
    assert_close(rest.double().square().sum(), s[r:].square().sum(), 1e-4)


@pytest.mark.parametrize("alpha", [8, 16, 4])
@pytest.mark.parametrize("svd_niter", [None, 16])
@pytest.mark.parametrize("shape", [(64, 192), (96, 32)])
def test_the_principal_part_is_trained_and_the_base_keeps_the_rest(
    shape: tuple[int, int], svd_niter: int | None, alpha: int
) -> None:
    weight, scale = decaying(*shape), alpha / 8
    rest, a, b = prepared(weight, lora_alpha=alpha, svd_niter=svd_niter)
    splits_the_weight(rest, a, b, weight, scale)
    broken(splits_the_weight, rest, 2 * a, b / 2, weight, scale)
    broken(splits_the_weight, rest, a, b, weight, 2 * scale)
    broken(splits_the_weight, weight - rest, a, b, weight, scale)


@pytest.mark.parametrize("alpha", [8, 16])
def test_it_is_pefts_pissa(alpha: int) -> None:
    import peft

    weight = decaying(64, 48)
    plain = nn.Sequential(nn.Linear(48, 64, bias=False))
    plain[0].weight = nn.Parameter(weight.clone())
    theirs = peft.get_peft_model(
        plain,
        peft.LoraConfig(r=8, lora_alpha=alpha, target_modules=["0"], init_lora_weights="pissa"),
    )
    layer: Any = theirs.get_submodule("base_model.model.0")
    rest, a, b = prepared(weight, lora_alpha=alpha)
    assert_close(rest, layer.base_layer.weight, 1e-5)
    assert_close(a.abs(), layer.lora_A.default.weight.abs(), 1e-4)
    assert_close(b @ a, layer.lora_B.default.weight @ layer.lora_A.default.weight, 1e-5)


@pytest.mark.parametrize("quantizer", ["nf4", "nf4_single", "fp4", "icq", "int8"])
def test_the_rest_is_rounded_with_less_error_than_the_weight(quantizer: str) -> None:
    choice, weight = reader.quantizer(quantizer, "float32"), decaying(256, 128)
    module = kind_module("quantizers", choice.kind)

    def error(matrix: Tensor) -> float:
        return float((matrix - module.decode(module.encode(matrix, choice.config))).norm())

    def is_less(one: Tensor, other: Tensor) -> None:
        assert error(one) < error(other)

    rest, a, b = prepared(weight)
    is_less(rest, weight)
    broken(is_less, b @ a, rest)


def parts(model: nn.Module) -> dict[str, Any]:
    """Name in the model -> PEFT's layer."""
    return {
        name.removeprefix(lora.PREFIX): each
        for name, each in model.named_modules()
        if hasattr(each, "initial_lora_A")
    }


def gives_the_weight_back(
    model: nn.Module, dense: nn.Module, scale: float, tolerance: float
) -> None:
    """In every layer the stored rest and the factors are the weight, which is stored in the
    base's dtype.
    """
    layers, originals = parts(model), linear_layers(dense)
    assert layers.keys() == originals.keys()
    for name, layer in layers.items():
        update = scale * layer.lora_B.default.weight.detach() @ layer.lora_A.default.weight.detach()
        assert layer.base_layer.weight.dtype == originals[name].weight.dtype
        whole = upright(layer.base_layer).float() + update
        assert_close(whole, upright(originals[name]).float(), tolerance, what=name)


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_every_layer_of_a_model_gives_its_weight_back(
    name: str, dtype: str, tolerance: float
) -> None:
    spec = spec_of(dataclasses.replace(spec_of(name).model, dtype=dtype), settings(lora_alpha=16))
    gives_the_weight_back(make(spec).model, load(spec, None), 2.0, tolerance)
    broken(gives_the_weight_back, stir(make(spec).model), load(spec, None), 2.0, tolerance)


def loss(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return -torch.stack(
            [answer_log_likelihood(model, example) for example in random_examples(0, count=4)]
        ).sum()


@both
def test_the_first_loss_is_the_bases(name: str) -> None:
    assert_close(loss(make(spec_of(name, "pissa_r8")).model), loss(load(spec_of(name), None)))


@both
def test_the_scale_divides_the_factors_and_changes_no_weight(name: str) -> None:
    one, other = (parts(make(spec_of(name, settings(lora_alpha=alpha))).model) for alpha in (8, 32))
    for each, layer in one.items():
        assert_close(layer.base_layer.weight, other[each].base_layer.weight)
        for key in ("lora_A", "lora_B"):
            assert_close(
                getattr(layer, key).default.weight, 2 * getattr(other[each], key).default.weight
            )


def is_the_change(
    folder: Path, trained: dict[str, Any], first: dict[str, Any], scale: float
) -> None:
    """The file's factors multiply to s (B A - B_0 A_0), at the scale that its settings say, up
    to the rounding of B_0 A_0.
    """
    written = json.loads((folder / "adapter_config.json").read_text())
    file = load_file(folder / "adapter_model.safetensors")
    assert written["lora_alpha"] / written["r"] == scale and not written["use_rslora"]
    assert len(file) == 2 * len(trained)
    for name, layer in trained.items():
        a, b = (file[f"{lora.PREFIX}{name}.lora_{each}.weight"] for each in "AB")
        assert a.shape[0] == b.shape[1] == written["r"] == 16
        then = first[name].lora_B.default.weight @ first[name].lora_A.default.weight
        now = layer.lora_B.default.weight @ layer.lora_A.default.weight
        assert_close(scale * b @ a, scale * (now - then), 1e-5, float(then.detach().norm()), name)


@both
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_the_file_is_the_change_of_the_weights_at_twice_the_rank(
    name: str, quantizer: str, tmp_path: Path
) -> None:
    spec = spec_of(name, settings(lora_alpha=16), quantizer)
    model, first = stir(make(spec).model), make(spec).model
    pissa.export(model, tmp_path)
    is_the_change(tmp_path, parts(model), parts(first), 2.0)
    broken(is_the_change, tmp_path, parts(stir(model)), parts(first), 2.0)
    pissa.export(first, tmp_path)
    is_the_change(tmp_path, parts(first), parts(first), 2.0)  # nothing was learned: no change


def distance(model: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        return float((all_logits(model.eval(), IDS) - all_logits(other.eval(), IDS)).norm())


@both
def test_on_the_original_weights_the_file_differs_from_a_quantized_model_by_the_rounding_alone(
    name: str, tmp_path: Path
) -> None:
    """W + s (B A - B_0 A_0) is q(W_res) + s B A but for q(W_res) - W_res: added to each weight,
    it makes the two equal.
    """
    import peft

    spec = spec_of(name, "pissa_r8", "nf4")
    model = stir(make(spec).model)
    pissa.export(model, tmp_path)
    dense = load(spec, None)
    plain = peft.PeftModel.from_pretrained(load(spec, None), tmp_path)
    assert distance(plain, model) > 1e-2
    found, rounded = linear_layers(dense), parts(model)
    with torch.no_grad():
        for each, layer in found.items():
            first = rounded[each]
            rest = upright(layer) - first.initial_lora_B @ first.initial_lora_A
            stored: Any = first.base_layer
            decoded = stored(torch.eye(stored.in_features)) - (
                0 if stored.bias is None else stored.bias
            )
            change = decoded.T - rest
            layer.weight += change.T if is_conv1d(layer) else change
    assert distance(peft.PeftModel.from_pretrained(dense, tmp_path), model) < 1e-2 * distance(
        plain, model
    )


def test_what_is_kept_for_the_export_is_neither_trained_nor_saved() -> None:
    model = make(spec_of(LLAMA, "pissa_r8", "nf4")).model
    kept = {name for name, _ in model.named_buffers() if "initial_" in name}
    assert len(kept) == 2 * len(parts(model)) > 0
    assert not kept & (set(dict(model.named_parameters())) | set(model.state_dict()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": 0}, "adapters.x.r: Input should be greater than 0"),
        ({"svd_niter": -1}, "adapters.x.svd_niter: Input should be greater than or equal to 0"),
        ({"lora_dropout": 0.1}, "adapters.x: "),
        ({"use_rslora": True}, "adapters.x: "),
    ],
)
def test_settings_that_cannot_be_are_refused_when_they_are_read(
    change: dict[str, Any], says: str
) -> None:
    values = dataclasses.asdict(reader.adapter("pissa_r8").config) | change
    with pytest.raises(UsageError) as error:
        build(pissa.Config, values, "adapters.x")
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_that_does_not_fit_is_refused_and_no_quantizer_is(stage: int) -> None:
    model = reader.model("llama3_1_8b")
    reason = refusal(spec_of(model, settings(r=1025), zero_stage=stage))
    assert reason is not None and reason.startswith(
        "rank 1025 is more than llama3_1_8b can have in self_attn.k_proj"
    )
    for quantizer in reader.entries("quantizers"):
        if stage < 3 or quantizer != "int8":  # which ZeRO-3 cannot divide, whatever the adapter
            assert refusal(spec_of(model, "pissa_r8", quantizer, zero_stage=stage)) is None


@pytest.mark.parametrize("adapter", ["pissa_r8", "loftq_r8"])
def test_the_closed_form_is_loras(adapter: str) -> None:
    count: Callable[..., int] = kind_module(
        "adapters", reader.adapter(adapter).kind
    ).trainable_parameters
    for name, per_rank in (
        ("gpt2_127m", 147_456),
        ("llama2_13b", 3_911_680),
        ("llama3_1_70b", 12_943_360),
    ):
        assert count(reader.model(name), reader.adapter(adapter).config) == 8 * per_rank
