"""The information-elastic connection of IR-QLoRA. The law: the layer computes y = W x + s (B +
beta_B R)(A + beta_A P) x with P and R as appendix A.2 (Eq. 16) of arXiv 2402.05445 writes them,
here as dense matrices in NumPy; folded, it is a plain LoRA."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import (
    CPU,
    MINIATURES,
    broken,
    gradients,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
)
from torch import Tensor, nn

from finrepro.errors import Interrupted
from finrepro.kinds import adapter_of, kind_module
from finrepro.methods.layers import iec
from finrepro.methods.layers.iec import IECLinear, mean_matrix, pool_and_repeat
from finrepro.methods.layers.supervised import backbone_and_head
from finrepro.training.checkpoint import Control
from finrepro.training.engines.deepspeed import make_whole
from finrepro.training.loop import train

# (in, out, r): r divides both, grouped keys and values of Llama 3.1, 11008 with r 64, neither
# divides, coprime, wider than the layer
SHAPES = (
    (64, 192, 8),
    (4096, 1024, 8),
    (11008, 96, 64),
    (96, 64, 48),
    (10, 14, 4),
    (7, 5, 3),
    (6, 4, 12),
)
sizes = pytest.mark.parametrize(("d_in", "d_out", "r"), SHAPES)


def runs(rows: int, columns: int) -> np.ndarray:
    """Eq. 16: g / columns where floor(row / (rows / g)) = floor(column / (columns / g)), g =
    gcd(rows, columns), else 0.
    """
    g = math.gcd(rows, columns)
    same = np.arange(rows)[:, None] // (rows // g) == np.arange(columns)[None] // (columns // g)
    return np.where(same, g / columns, 0.0)


def layer_of(d_in: int, d_out: int, r: int, dropout: float = 0.0, base: Any = None) -> IECLinear:
    """A layer whose every parameter is away from its beginning, in double precision."""
    torch.manual_seed(1)
    base = base if base is not None else nn.Linear(d_in, d_out)
    layer = IECLinear(base, r, 16, dropout, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.beta_A.fill_(0.3)
        layer.beta_B.fill_(-0.7)
    return layer


def by_definition(layer: IECLinear, x: Tensor) -> np.ndarray:
    """W x + b + s (B + beta_B R)(A + beta_A P) x, with dense P and R."""
    a, b, beta_a, beta_b, weight, bias = (
        each.detach().numpy()
        for each in (
            layer.lora_A,
            layer.lora_B,
            layer.beta_A,
            layer.beta_B,
            layer.base_layer.weight,
            layer.base_layer.bias,
        )
    )
    first, second = a + beta_a * runs(*a.shape), b + beta_b * runs(*b.shape)
    return x.numpy() @ (weight + 16 / layer.r * second @ first).T + bias


def layer_is_its_equation(layer: IECLinear, x: Tensor) -> None:
    np.testing.assert_allclose(
        layer(x).detach().numpy(), by_definition(layer, x), rtol=1e-9, atol=1e-9
    )


def tiled(x: Tensor, width: int) -> Tensor:
    """A mutant: the means repeated as a whole, 1 2 1 2 for 1 1 2 2."""
    g = math.gcd(x.shape[-1], width)
    return x.unflatten(-1, (g, -1)).mean(-1).repeat(*(1,) * (x.ndim - 1), width // g)


def strided(x: Tensor, width: int) -> Tensor:
    """A mutant: means over channels far apart."""
    g = math.gcd(x.shape[-1], width)
    return x.unflatten(-1, (-1, g)).mean(-2).repeat_interleave(width // g, -1)


@sizes
def test_the_layer_is_its_equation_and_repeats_neighbours(
    d_in: int, d_out: int, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_of(d_in, d_out, r), torch.randn(2, 3, d_in, dtype=torch.float64)
    layer_is_its_equation(layer, x)
    assert np.array_equal(mean_matrix(r, d_in).numpy(), runs(r, d_in))
    for mutant in (tiled, strided) if math.gcd(d_in, r) > 1 else ():
        monkeypatch.setattr(iec, "pool_and_repeat", mutant)
        broken(layer_is_its_equation, layer, x)


def test_means_of_neighbours_go_to_neighbours() -> None:
    x = torch.tensor([1.0, 3.0, 10.0, 20.0])
    assert pool_and_repeat(x, 2).tolist() == [2, 15]
    assert pool_and_repeat(x, 8).tolist() == [1, 1, 3, 3, 10, 10, 20, 20]
    assert pool_and_repeat(x, 6).tolist() == [2, 2, 2, 15, 15, 15]
    assert pool_and_repeat(x, 3).tolist() == [8.5, 8.5, 8.5]


def folding_changes_nothing(layer: IECLinear, x: Tensor) -> None:
    """In evaluation the folded factors, as a plain LoRA, give what the layer gives."""
    first, second = layer.folded()
    plain = (
        layer.base_layer(x) + layer.lora_alpha / layer.r * x @ first.double().T @ second.double().T
    )
    np.testing.assert_allclose(plain.detach(), layer.eval()(x).detach(), rtol=1e-5, atol=1e-5)


@sizes
def test_a_folded_layer_is_a_plain_lora(d_in: int, d_out: int, r: int) -> None:
    layer, x = layer_of(d_in, d_out, r, dropout=0.5), torch.randn(5, d_in, dtype=torch.float64)
    folding_changes_nothing(layer, x)
    mutant = copy.deepcopy(layer)
    mutant.folded = lambda: (layer.lora_A.detach().float(), layer.lora_B.detach().float())  # type: ignore[method-assign]
    broken(folding_changes_nothing, mutant, x)


def test_the_slopes_are_those_of_finite_differences() -> None:
    layer = layer_of(6, 4, 4)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    trained = [layer.lora_A, layer.lora_B, layer.beta_A, layer.beta_B]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *trained))


def first_slope_of_beta_b_is(
    layer: IECLinear, x: Tensor, wanted: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """At B = 0, beta = 0: d loss / d beta_B = s sum(R z * g) with z = A x and g = d loss / d y."""
    y = layer(x)
    g = torch.randn_like(y)
    (slope,) = torch.autograd.grad((y * g).sum(), layer.beta_B)
    z = x @ layer.lora_A.T
    np.testing.assert_allclose(slope.item(), wanted(z, g).item(), rtol=1e-9)


@sizes
def test_the_first_slope_of_beta_b_is_the_pooled_direction(d_in: int, d_out: int, r: int) -> None:
    base = nn.Linear(d_in, d_out)
    layer = IECLinear(base, r, 16, 0.0, torch.Generator().manual_seed(0)).double()
    x = torch.randn(4, d_in, dtype=torch.float64)
    pooled = torch.from_numpy(runs(d_out, r))
    first_slope_of_beta_b_is(layer, x, lambda z, g: 16 / r * (z @ pooled.T * g).sum())
    broken(first_slope_of_beta_b_is, layer, x, lambda z, g: (z @ pooled.T * g).sum() * 17 / r)


def shortcut_is_whole(layer: IECLinear, x: Tensor) -> None:
    """With A = 0, so that dropout has nothing to drop, training computes what evaluation
    computes.
    """
    with torch.no_grad():
        layer.lora_A.zero_()
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_the_shortcut_sees_the_input_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(64, 32, 8, dropout=0.5), torch.randn(4, 64, dtype=torch.float64)
    assert not torch.equal(layer.train()(x), layer.eval()(x)), "A's path has dropout"
    shortcut_is_whole(layer, x)
    mutant = copy.deepcopy(layer)
    monkeypatch.setattr(
        iec, "pool_and_repeat", lambda x, width: pool_and_repeat(mutant.dropout(x), width)
    )
    broken(shortcut_is_whole, mutant, x)


def test_dropout_keeps_the_expectation() -> None:
    layer, x = layer_of(16, 8, 4, dropout=0.3), torch.randn(16, dtype=torch.float64)
    many = layer.train()(x.expand(2000, -1))
    error = many.std(0) / 2000**0.5
    assert ((many.mean(0) - layer.eval()(x)).abs() < 4 * error).all()


@pytest.mark.parametrize("quantizer", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_output_has_the_inputs_dtype_and_the_parameters_are_float32(
    quantizer: str, dtype: str
) -> None:
    half = dataclasses.replace(spec_of(MINIATURES[0]).model, dtype=dtype)
    model = make(spec_of(half, "iec_r8", quantizer)).model
    layer: Any = next(each for each in model.modules() if isinstance(each, IECLinear))
    x = torch.randn(2, layer.lora_A.shape[1], dtype=getattr(torch, dtype))
    assert layer(x).dtype == x.dtype and {p.dtype for p in (layer.lora_A, layer.beta_B)} == {
        torch.float32
    }
    assert [tuple(each.shape) for each in (layer.beta_A, layer.beta_B)] == [(1,), (1,)]


def scalars(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "beta_" in name]


def test_the_scalars_start_at_zero_are_trained_and_do_not_decay() -> None:
    spec = spec_of(MINIATURES[0], "iec_r8")
    model = make(spec).model
    assert all(not each.any() and each.requires_grad for each in scalars(model))
    decaying = dataclasses.replace(spec.train.optimizer.config, weight_decay=0.5)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = (
        kind_module("optimizers", spec.train.optimizer.kind)
        .build(named, 1e-2, decaying)
        .param_groups
    )
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert spared == {id(each) for each in scalars(model)}


FEW = {
    "max_steps": 2,
    "warmup_steps": 1,
    "global_batch_size": 2,
    "sort_window": 1,
    "max_tokens": 96,
}
EXAMPLES = random_examples(0, 8)
ENGINES = (("deepspeed", 0), ("deepspeed", 2), ("deepspeed", 3), ("ddp", 0))


def control(
    folder: Path, stop: Callable[[], bool] = lambda: False, seen: list[Any] | None = None
) -> Control:
    """No clock: checkpoints are written on request only."""
    return Control((seen if seen is not None else []).append, stop, folder, checkpoint_seconds=1e9)


def resumed_scalars_are_those_saved(
    spec: Any, folder: Path, spoil: Callable[[Path], None] = lambda _: None
) -> None:
    """A run that is taken up after its last step has the scalars of the checkpoint, bit by bit:
    training has nothing left to do.
    """
    model, again, seen = make(spec).model, make(spec).model, []
    with torch.no_grad():
        for index, each in enumerate(scalars(model)):
            each.fill_((0.3, -0.7)[index % 2])
    with pytest.raises(Interrupted):
        train(
            model, EXAMPLES, spec, CPU, control(folder, lambda: len(seen) >= FEW["max_steps"], seen)
        )
    make_whole(model)
    spoil(folder)
    train(again, EXAMPLES, spec, CPU, control(folder))
    kept, restored = ([float(each.detach()) for each in scalars(each)] for each in (model, again))
    assert restored == kept and all(abs(value) > 0.1 for value in kept)


@pytest.mark.parametrize(("engine", "zero_stage"), ENGINES)
def test_the_scalars_are_restored_on_resume(engine: Any, zero_stage: int, tmp_path: Path) -> None:
    spec = spec_of(MINIATURES[0], "iec_r8", **FEW, engine=engine, zero_stage=zero_stage)
    resumed_scalars_are_those_saved(spec, tmp_path / "whole")
    if engine == "ddp":
        broken(resumed_scalars_are_those_saved, spec, tmp_path / "mutant", without_scalars)


def without_scalars(folder: Path) -> None:
    """A mutant: the checkpoint of someone who thought of the factors alone."""
    (path,) = folder.rglob("ddp.pt")
    whole = torch.load(path, weights_only=True)
    whole["weights"] = {
        name: value * ("beta_" not in name) for name, value in whole["weights"].items()
    }
    torch.save(whole, path)


def test_the_exported_settings_are_those_of_plain_lora(tmp_path: Path) -> None:
    files = []
    for adapter in ("iec_r8", "lora_r8"):
        spec = spec_of(MINIATURES[0], adapter, "nf4")
        (tmp_path / adapter).mkdir()
        adapter_of(spec.adapter).export(make(spec).model, tmp_path / adapter)
        files.append(json.loads((tmp_path / adapter / "adapter_config.json").read_text()))
    assert files[0] == files[1]


@pytest.mark.parametrize("name", MINIATURES)
def test_a_model_without_a_wrapper_trains_as_one_with_it(name: str) -> None:
    """Activation checkpointing and the calls of backbone and head by themselves."""
    model = stir(make(spec_of(name, "iec_r8", "nf4")).model)
    checkpointed = stir(make(spec_of(name, "iec_r8", "nf4", activation_checkpointing=True)).model)
    ids = torch.tensor([random_examples(3, count=1, longest=30)[0].ids])
    found = []
    for each in (model, checkpointed):
        backbone, head = backbone_and_head(each)
        head(backbone(input_ids=ids, use_cache=False).last_hidden_state).logsumexp(
            -1
        ).sum().backward()
        found.append(gradients(each))
    assert all(torch.equal(value, found[1][key]) and value.any() for key, value in found[0].items())
