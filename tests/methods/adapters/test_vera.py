"""VeRA's shared random matrices, what its file holds with and without them, its counts on the
real models, and settings that cannot be.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model import (
    CPU,
    MINIATURES,
    all_logits,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
)
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.compatibility import refusal
from finrepro.errors import UsageError
from finrepro.methods.adapters import vera
from finrepro.models.build import configuration, load
from finrepro.settings import Choice, build
from finrepro.sizes.shapes import block_sizes
from finrepro.training.checkpoint import Control
from finrepro.training.loop import train

IDS = tuple(random_examples(11, count=1, longest=30)[0].ids) * 3
both = pytest.mark.parametrize("name", MINIATURES)
# Trained at r 256, and what A and B hold, once
COUNTS = {
    "gpt2_127m": (95_232, 1_572_864),
    "gpt2_1_5b": (740_352, 3_276_800),
    "llama2_7b": (1_417_216, 5_636_096),
    "llama2_13b": (2_201_600, 7_077_888),
    "llama3_1_8b": (1_433_600, 7_340_032),
    "llama3_1_70b": (6_860_800, 14_680_064),
}


def settings(**changes: Any) -> Choice:
    config = dataclasses.asdict(reader.adapter("vera_r256").config)
    return Choice(name="changed", kind="vera", config=vera.Config(**config | changes))


def adapted(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "vera_lambda_d")}


def drawn(key: int, rank: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """A and B as their definition says: one generator, uniform within sqrt(6 / columns)
    (Kaiming's bound).
    """
    generator, bound = torch.Generator().manual_seed(key), lambda columns: (6 / columns) ** 0.5
    a = torch.empty(rank, inputs).uniform_(-bound(inputs), bound(inputs), generator=generator)
    b = torch.empty(outputs, rank).uniform_(-bound(rank), bound(rank), generator=generator)
    return a, b


@both
def test_every_layer_takes_its_part_of_one_pair_of_matrices_drawn_from_the_key(name: str) -> None:
    """And the widest layer all of it; the cell's seed decides nothing, another key does."""
    spec = spec_of(name, "vera_r256")
    torch.rand(7)  # what was drawn before does not matter
    model = make(dataclasses.replace(spec, seed=5)).model
    sizes = block_sizes(spec.model).values()
    a, b = drawn(0, 256, max(i for i, _ in sizes), max(o for _, o in sizes))
    layers = adapted(model)
    for layer in layers.values():
        assert torch.allclose(layer.vera_A["default"], a, rtol=1e-6) and torch.allclose(
            layer.vera_B["default"], b, rtol=1e-6
        )
        assert (
            not layer.vera_A["default"].requires_grad and not layer.vera_B["default"].requires_grad
        )
    assert len({each.vera_A["default"].data_ptr() for each in layers.values()}) == 1
    assert {(each.in_features, each.out_features) for each in layers.values()} == set(sizes)
    other = next(iter(adapted(make(spec_of(name, settings(projection_prng_key=1))).model).values()))
    assert not torch.allclose(other.vera_A["default"], a)


@both
def test_it_starts_at_the_settings_d_and_at_b_of_zero(name: str) -> None:
    for layer in adapted(make(spec_of(name, settings(d_initial=0.07))).model).values():
        assert torch.equal(layer.vera_lambda_d["default"], torch.full((256,), 0.07))
        assert not layer.vera_lambda_b["default"].any()


@both
def test_without_the_projection_the_file_holds_the_vectors_alone_and_is_read_back(
    name: str, tmp_path: Path
) -> None:
    """4 (r + out) bytes a layer and the file's index; PEFT draws the matrices again, and warns
    that another machine may draw others.
    """
    import peft

    spec = spec_of(name, settings(save_projection=False))
    built = make(spec)
    vera.export(stir(built.model), tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 0 < size - 4 * built.trainable_parameters < 200 * 2 * len(adapted(built.model))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not")
        again = peft.PeftModel.from_pretrained(load(spec, None), tmp_path)
    with torch.no_grad():
        assert torch.equal(all_logits(again.eval(), IDS), all_logits(built.model.eval(), IDS))


@pytest.mark.parametrize("name", COUNTS)
def test_vera_on_the_real_models_counts_as_in_the_table(name: str) -> None:
    from transformers import AutoModelForCausalLM

    choice, entry = reader.adapter("vera_r256"), reader.model(name)
    with torch.device("meta"):
        model: Any = vera.apply(
            AutoModelForCausalLM.from_config(configuration(entry)), choice.config, 0
        )
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    shared = model.base_model.vera_A["default"].numel() + model.base_model.vera_B["default"].numel()
    assert (trained, shared) == COUNTS[name]
    assert vera.trainable_parameters(entry, choice.config) == trained


@both
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_its_weights_are_float32_whatever_the_base(name: str, quantizer: str) -> None:
    model = make(
        spec_of(dataclasses.replace(spec_of(name).model, dtype="bfloat16"), "vera_r256", quantizer)
    ).model
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}
    assert torch.isfinite(all_logits(stir(model), IDS)).all()


@pytest.mark.parametrize(("engine", "stage"), [("ddp", 0), ("deepspeed", 1), ("deepspeed", 2)])
def test_every_engine_that_it_goes_with_trains_it_alike(
    engine: Any, stage: int, tmp_path: Path
) -> None:
    few: dict[str, Any] = {
        "max_steps": 3,
        "warmup_steps": 1,
        "global_batch_size": 8,
        "sort_window": 2,
    }
    data, losses = random_examples(3, count=24, longest=20, answers=(1, 3)), []
    for zero_stage, kind in ((stage, engine), (0, "deepspeed")):
        spec = spec_of(
            MINIATURES[1], "vera_r256", zero_stage=zero_stage, engine=kind, lr=0.05, **few
        )
        control = Control(lambda _: None, lambda: False, tmp_path / kind, checkpoint_seconds=1e9)
        losses.append(
            [row["loss"] for row in train(make(spec).model, data, spec, CPU, control).losses]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize(
    "change", [{"r": 0}, {"d_initial": 0.0}, {"vera_dropout": 1.0}, {"projection_prng_key": -1}]
)
def test_settings_that_cannot_be_are_refused_when_they_are_read(change: dict[str, Any]) -> None:
    values = dataclasses.asdict(reader.adapter("vera_r256").config) | change
    with pytest.raises(UsageError, match=rf"^adapters\.x\.{next(iter(change))}: [^\n]*$"):
        build(vera.Config, values, "adapters.x")


def test_what_cannot_run_is_refused_before_anything_is_loaded() -> None:
    reason = refusal(spec_of(MINIATURES[1], settings(target_modules=("c_attn",))))
    assert reason is not None and reason.startswith(
        "no linear layer of the model is named c_attn; there are down_proj"
    )
    assert (
        refusal(spec_of(MINIATURES[1], "vera_r256", zero_stage=3))
        == "VeRA has not been tested at ZeRO-3"
    )
    with pytest.raises(ValueError, match="named c_attn; there are"):
        make(spec_of(MINIATURES[1], settings(target_modules=("c_attn",))))
