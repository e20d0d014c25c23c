"""Bottleneck adapters. The law: behind each sub-layer h + W_up gelu(W_down h + b_down) + b_up
(arXiv 1902.00751, section 2.1), here in NumPy; the model answers with a cache as without one,
and what is exported is read back strictly."""

import copy
import dataclasses
import io
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
    gradients,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
    stirred,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import EnvironmentFault
from finrepro.methods.adapters import bottleneck as method
from finrepro.methods.layers.bottleneck import NORMS, SUBLAYERS, Bottleneck, TrainedNorm
from finrepro.models.build import configuration, load, quantize
from finrepro.settings import Choice

IDS = random_examples(11, count=1, longest=30)[0].ids * 3
everywhere = pytest.mark.parametrize("name", MINIATURES)


def spec_with(
    name: str, quantizer: str = "none", dtype: str = "float32", **changes: Any
) -> RunSpec:
    """A cell with the entry's settings, changed."""
    entry = reader.adapter("houlsby_m64")
    choice = Choice(
        name="changed", kind="bottleneck", config=dataclasses.replace(entry.config, **changes)
    )
    return spec_of(dataclasses.replace(spec_of(name).model, dtype=dtype), choice, quantizer)


class Doubled(nn.Module):
    """A sub-layer: twice its input, in its dtype, alone or with something beside it as attention
    gives it.
    """

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.weight, self.beside = nn.Parameter(torch.full((1,), 2.0), requires_grad=False), beside

    def forward(self, x: Tensor, more: Tensor | None = None) -> Any:
        out = x * self.weight.to(x.dtype)
        return (out, more) if self.beside else out


def layer_is_its_equation(layer: Bottleneck, x: Tensor) -> None:
    h, down, up = (2 * x).double().numpy(), layer.down, layer.up
    w1, b1, w2, b2 = (
        each.detach().double().numpy() for each in (down.weight, down.bias, up.weight, up.bias)
    )
    z = h @ w1.T + b1
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    np.testing.assert_allclose(layer(x).detach(), h + gelu @ w2.T + b2, rtol=1e-4, atol=1e-4)


def test_the_layer_is_its_equation() -> None:
    layer = stir(
        Bottleneck(Doubled(beside=False), 12, 5, 0.5, False, torch.Generator().manual_seed(0))
    )
    x = torch.randn(2, 3, 12)
    layer_is_its_equation(layer, x)
    mutant = copy.deepcopy(layer)
    mutant.adapt = lambda h: h + mutant.up(nn.functional.gelu(mutant.down(h)) * 1.01)  # type: ignore[method-assign]
    broken(layer_is_its_equation, mutant, x)


def test_attention_keeps_what_it_gives_beside_its_output() -> None:
    layer, beside = (
        Bottleneck(Doubled(beside=True), 4, 2, 1.0, False, torch.Generator()),
        torch.ones(1),
    )
    out, kept = layer(torch.ones(1, 4), more=beside)
    assert kept is beside and torch.equal(out, layer.adapt(torch.full((1, 4), 2.0)))
    half = layer(torch.ones(1, 4, dtype=torch.bfloat16))[0]
    assert half.dtype == torch.bfloat16


def drawn_as_claimed(layer: Bottleneck, std: float, zero_up: bool) -> None:
    """Within two standard deviations and near them, 0.88 of them wide as a normal distribution
    cut there is; biases zero.
    """
    matrices = [layer.down.weight] if zero_up else [layer.down.weight, layer.up.weight]
    for each in matrices:
        assert 1.9 * std < each.abs().max() <= 2 * std
        assert each.std().item() == pytest.approx(0.8796 * std, rel=0.02)
    assert bool(layer.up.weight.any()) is not zero_up
    assert not layer.down.bias.any() and not layer.up.bias.any()


@pytest.mark.parametrize("zero_up", [False, True])
def test_weights_are_drawn_from_a_truncated_normal(zero_up: bool) -> None:
    layer = Bottleneck(
        Doubled(beside=False), 512, 64, 1e-3, zero_up, torch.Generator().manual_seed(0)
    )
    drawn_as_claimed(layer, 1e-3, zero_up)
    broken(drawn_as_claimed, layer, 1e-3, not zero_up)
    with torch.no_grad():
        layer.down.weight.normal_(std=0.8796e-3)
    broken(drawn_as_claimed, layer, 1e-3, zero_up)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return all_logits(model, IDS)


def base_of(spec: RunSpec) -> Any:
    """The cell's base, quantized, before any adapter."""
    model = load(spec, None)
    quantize(model, spec.quantizer)
    return model.requires_grad_(False)


@everywhere
@pytest.mark.parametrize("quantizer", ["none", "nf4", "int8"])
def test_with_zero_up_nothing_changes_at_first(name: str, quantizer: str) -> None:
    spec = spec_with(name, quantizer, zero_up=True)
    assert torch.equal(logits(make(spec).model), logits(base_of(spec).train()))


@everywhere
def test_in_bfloat16_the_change_at_first_is_its_rounding(name: str) -> None:
    """Norms that are trained are computed in float32 and rounded once, where Llama's own rounds
    twice.
    """
    for norms, within in ((False, 0.0), (True, 0.05)):
        spec = spec_with(name, dtype="bfloat16", zero_up=True, train_layer_norms=norms)
        assert_close(logits(make(spec).model), logits(base_of(spec)), within)


@everywhere
@pytest.mark.parametrize("norms", [True, False])
def test_every_block_has_two_adapters_and_its_norms_are_trained_where_asked(
    name: str, norms: bool
) -> None:
    spec = spec_with(name, train_layer_norms=norms)
    model, family = make(spec).model, spec.model.family
    blocks = model.config.num_hidden_layers
    for kind, places, count in (
        (Bottleneck, SUBLAYERS, 2 * blocks),
        (TrainedNorm, NORMS, 2 * blocks * norms),
    ):
        hit = [each for each, module in model.named_modules() if isinstance(module, kind)]
        assert len(hit) == count and {each.rpartition(".")[2] for each in hit} == set(
            places[family] if count else ()
        )
    trained = {each for each, p in model.named_parameters() if p.requires_grad}
    assert trained == set(method._tensors(model))


# At m = 64: 2 (2 m d + m + d) a block, and the blocks' layer norms
COUNTS = {
    "gpt2_127m": (2_379_264, 36_864),
    "gpt2_1_5b": (19_820_544, 307_200),
    "llama2_7b": (33_820_672, 262_144),
    "llama2_13b": (52_843_520, 409_600),
    "llama3_1_8b": (33_820_672, 262_144),
    "llama3_1_70b": (169_093_120, 1_310_720),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_real_models_count_as_in_the_table(name: str) -> None:
    """On two blocks of each, which are all alike: drawing 169 million numbers proves no more."""
    from transformers import AutoModelForCausalLM

    model, config, (adapters, norms) = (
        reader.model(name),
        reader.adapter("houlsby_m64").config,
        COUNTS[name],
    )
    assert method.trainable_parameters(model, config) == adapters + norms
    without = dataclasses.replace(config, train_layer_norms=False)
    assert method.trainable_parameters(model, without) == adapters
    depth = "n_layer" if model.family == "gpt2" else "num_hidden_layers"
    short = dataclasses.replace(model, architecture={**model.architecture, depth: 2})
    for each, whole in ((config, adapters + norms), (without, adapters)):
        with torch.device("meta"):
            adapted = method.apply(AutoModelForCausalLM.from_config(configuration(short)), each, 0)
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert count * model.architecture[depth] == 2 * whole


def every_adapter_has_a_slope(model: nn.Module) -> None:
    answer_log_likelihood(model, random_examples(0, count=1, longest=30)[0]).backward()
    for name, slope in gradients(model).items():
        assert slope.any(), name


@everywhere
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_both_adapters_of_every_block(name: str, checkpointing: bool) -> None:
    spec = spec_of(name, "houlsby_m64", "nf4", activation_checkpointing=checkpointing)
    every_adapter_has_a_slope(make(spec).model)
    mutant = make(spec).model
    layer = next(module for module in mutant.modules() if isinstance(module, Bottleneck))
    layer.adapt = lambda h: h  # type: ignore[method-assign]
    broken(every_adapter_has_a_slope, mutant)


@everywhere
def test_checkpointing_and_copies_change_nothing(name: str) -> None:
    found, outputs = [], []
    buffer = io.BytesIO()
    torch.save(stirred(name, "houlsby_m64", "none"), buffer)
    buffer.seek(0)
    for model in (
        stirred(name, "houlsby_m64", "none"),  # a deep copy
        torch.load(buffer, weights_only=False),
        stir(make(spec_of(name, "houlsby_m64", activation_checkpointing=True)).model),
    ):
        answer_log_likelihood(model, random_examples(0, count=1, longest=30)[0]).backward()
        found.append(gradients(model))
        outputs.append(logits(model))
    for slopes, output in zip(found[1:], outputs[1:], strict=True):
        assert torch.equal(output, outputs[0])
        assert slopes.keys() == found[0].keys() and all(
            torch.equal(v, found[0][k]) for k, v in slopes.items()
        )


def a_cache_changes_nothing(model: Any) -> None:
    """Token by token with a key-value cache, as in one pass."""
    ids = torch.tensor([IDS])
    whole, cache, steps = model(input_ids=ids, use_cache=False).logits, None, []
    for position in range(len(IDS)):
        out = model(
            input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        steps.append(out.logits)
    assert_close(torch.cat(steps, 1), whole, 1e-4)


@everywhere
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_with_a_cache_it_computes_what_it_computes_without(name: str, quantizer: str) -> None:
    with torch.no_grad():
        model = stirred(name, "houlsby_m64", quantizer).eval()
        a_cache_changes_nothing(model)
        layer: Any = next(module for module in model.modules() if isinstance(module, Bottleneck))
        layer.adapt = lambda h: (
            h + h.mean(1, keepdim=True)
        )  # a mutant that sees more than its own position
        broken(a_cache_changes_nothing, model)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    method.export(stirred(MINIATURES[0], "houlsby_m64"), tmp_path)
    return tmp_path


def changed_settings(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / method.SETTINGS).read_text())
        change(values)
        (folder / method.SETTINGS).write_text(json.dumps(values))

    return apply


def changed_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / method.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / method.WEIGHTS)

    return apply


FIRST = "transformer.h.0.attn.down.weight"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no settings": (lambda folder: (folder / method.SETTINGS).unlink(), "cannot be read"),
    "no weights": (lambda folder: (folder / method.WEIGHTS).unlink(), "cannot be read"),
    "broken settings": (
        lambda folder: (folder / method.SETTINGS).write_text("{"),
        "cannot be read",
    ),
    "a list": (
        lambda folder: (folder / method.SETTINGS).write_text("[]"),
        "not an adapter of the format",
    ),
    "broken weights": (
        lambda folder: (folder / method.WEIGHTS).write_bytes(b"123"),
        "cannot be read",
    ),
    "another format": (
        changed_settings(lambda v: v.update(format="x")),
        "not an adapter of the format",
    ),
    "one key more": (changed_settings(lambda v: v.update(more=1)), "not an adapter of the format"),
    "another base": (
        changed_settings(lambda v: v["base"].update(base_model_name_or_path="x")),
        "is for .*'x'",
    ),
    "another size": (changed_settings(lambda v: v["base"].update(width=128)), "is for .*128"),
    "no such setting": (
        changed_settings(lambda v: v["settings"].update(rank=1)),
        "unknown setting 'rank'",
    ),
    "no settings at all": (
        changed_settings(lambda v: v.update(settings=None)),
        "not an adapter of the format",
    ),
    "a setting less": (changed_settings(lambda v: v["settings"].pop("zero_up")), "zero_up"),
    "a wrong setting": (
        changed_settings(lambda v: v["settings"].update(bottleneck_size=0)),
        "greater than 0",
    ),
    "another bottleneck": (
        changed_settings(lambda v: v["settings"].update(bottleneck_size=8)),
        "another shape",
    ),
    "norms not said": (
        changed_settings(lambda v: v["settings"].update(train_layer_norms=False)),
        "without a place",
    ),
    "a tensor less": (changed_tensors(lambda t: t.pop(FIRST)), f"lacks {FIRST} and 0 more"),
    "a tensor more": (
        changed_tensors(lambda t: t.update(more=torch.ones(1))),
        "holds, without a place for it, more",
    ),
    "half": (
        changed_tensors(lambda t: t.update({FIRST: t[FIRST].half()})),
        f"another shape or dtype of {FIRST}",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_folder_that_is_not_the_models_is_refused_in_one_line(what: str, exported: Path) -> None:
    spoil, says = WRONG[what]
    method.read(base_of(spec_of(MINIATURES[0])), exported)
    spoil(exported)
    with pytest.raises(EnvironmentFault, match=says) as refused:
        method.read(base_of(spec_of(MINIATURES[0])), exported)
    assert "\n" not in str(refused.value)


def test_another_model_is_refused(exported: Path) -> None:
    with pytest.raises(
        EnvironmentFault, match=r"is for .*gpt2_127m_mini.* not for .*llama3_1_8b_mini"
    ):
        method.read(base_of(spec_of(MINIATURES[1])), exported)


def test_what_is_read_back_is_frozen_and_can_be_exported_again(
    exported: Path, tmp_path: Path
) -> None:
    model = method.read(base_of(spec_of(MINIATURES[0], quantizer="nf4")), exported)
    assert not any(p.requires_grad for p in model.parameters())
    (tmp_path / "again").mkdir()
    method.export(model, tmp_path / "again")
    for name in (method.SETTINGS, method.WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def test_nothing_offers_to_merge_it() -> None:
    """They are not linear: no weight of the base could stand for them."""
    model = make(spec_of(MINIATURES[0], "houlsby_m64")).model
    assert not any(hasattr(model, each) for each in ("merge_and_unload", "merge_adapter"))
    assert not any(hasattr(method, each) for each in ("merge", "fold"))
