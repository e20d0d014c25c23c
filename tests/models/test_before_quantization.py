"""The first stage: what a method makes of a layer's weight before it is quantized; the
decomposition that PiSSA and LoftQ start from.
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
    CPU,
    MINIATURES,
    assert_close,
    broken,
    images,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
)
from fixtures.process import PROGRAMS, on_ranks
from torch import Tensor, nn

from finrepro.errors import Interrupted
from finrepro.kinds import adapter_of
from finrepro.methods.adapters import lora, pissa
from finrepro.methods.layers.linear import is_conv1d, linear_layers
from finrepro.methods.layers.principal import principal_factors
from finrepro.models import loading
from finrepro.models.before_quantization import FirstStage, first_stage
from finrepro.models.build import load, skeleton, source
from finrepro.runtime import process as runtime
from finrepro.settings import Choice
from finrepro.training.checkpoint import Control
from finrepro.training.loop import train

GPT2, LLAMA = MINIATURES
both = pytest.mark.parametrize("name", MINIATURES)
preparing = pytest.mark.parametrize("adapter", ["pissa_r8", "loftq_r8"])


def upright(layer: Any) -> Tensor:
    """A plain layer's weight as (out, in)."""
    weight: Tensor = layer.weight.detach()
    return weight.T if is_conv1d(layer) else weight


# The hook.


@dataclasses.dataclass
class Probe:
    """In a method's place: sees what comes, gives half of it back, and keeps a number."""

    stage: Any = None
    seen: dict[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        name: str,
        weight: Tensor,
        quantized: Callable[[Tensor], Tensor],
        config: Any,
        seed: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert (
            name not in self.seen
            and weight.dtype == torch.float32
            and weight.is_contiguous()
            and config.r
        )
        parts = [part for _, part in loading.in_order(self.stage._model)]
        here = next(
            i
            for i, part in enumerate(parts)
            if self.stage._model.get_submodule(name) in part.modules()
        )
        assert all(p.is_meta for part in parts[here + 1 :] for p in part.parameters()), (
            "a later part is there already"
        )
        self.seen[name] = weight.clone(), quantized(weight / 2)
        return weight / 2, {"seed": torch.tensor(seed)}


def probed(spec: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Probe, FirstStage]:
    model, probe = skeleton(spec), Probe()
    monkeypatch.setattr(pissa, "prepare", probe)
    probe.stage = first_stage(spec, model)
    loading.stream(model, source(spec, model, None), spec.quantizer, CPU, None, probe.stage)
    return model, probe, probe.stage


def stands_for(layer: nn.Module, weight: Tensor) -> None:
    """The layer computes with this weight (out, in); LLM.int8's product is rounded to 16 bits."""
    bias: Any = layer.bias
    with torch.no_grad():
        found = layer(torch.eye(weight.shape[1], dtype=torch.float32)) - (
            0 if bias is None else bias
        )
    assert_close(found.T, weight, 1e-3)


@both
@pytest.mark.parametrize("quantizer", ["none", "nf4", "int8", "icq"])
def test_each_target_is_seen_once_in_full_precision_and_what_comes_back_is_what_is_stored(
    name: str, quantizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(spec_of(name, "pissa_r8", quantizer), seed=3)
    model, probe, stage = probed(spec, monkeypatch)
    dense = linear_layers(load(spec, None))
    assert list(probe.seen) == list(dense) == list(stage.prepared)
    assert {int(state["seed"]) for state in stage.prepared.values()} == {3}
    for each, layer in dense.items():
        given, halved = probe.seen[each]
        assert torch.equal(given, upright(layer))
        stands_for(model.get_submodule(each), halved)
        broken(stands_for, model.get_submodule(each), given)


@both
def test_what_is_rounded_for_a_method_has_the_models_own_dtype(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = dataclasses.replace(spec_of(name).model, dtype="bfloat16")
    model, probe, _ = probed(spec_of(half, "pissa_r8"), monkeypatch)
    for each, layer in linear_layers(model).items():
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(upright(layer).float(), probe.seen[each][1])


def test_layers_that_are_no_target_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(LLAMA, "pissa_r8")
    config = dataclasses.replace(spec.adapter.config, target_modules=("q_proj",))
    spec = dataclasses.replace(spec, adapter=Choice(name="few", kind="pissa", config=config))
    model, probe, _ = probed(spec, monkeypatch)
    dense, found = linear_layers(load(spec, None)), linear_layers(model)
    halved = {each for each in dense if not torch.equal(dense[each].weight, found[each].weight)}
    assert halved == set(probe.seen) == {each for each in dense if each.endswith("q_proj")}
    monkeypatch.undo()
    hit = {each for each, layer in make(spec).model.named_modules() if hasattr(layer, "lora_A")}
    assert hit == {f"{lora.PREFIX}{each}" for each in halved}


def test_a_method_without_a_first_stage_has_none() -> None:
    for adapter in ("lora_r8", "iec_r8", "full", "base"):
        assert first_stage(spec_of(LLAMA, adapter), skeleton(spec_of(LLAMA))) is None


@preparing
@pytest.mark.parametrize("quantizer", ["none", "nf4", "int8"])
def test_without_the_first_stage_nothing_is_adapted(adapter: str, quantizer: str) -> None:
    from finrepro.models.build import quantize

    spec = spec_of(GPT2, adapter, quantizer)
    model = load(spec, None)
    quantize(model, spec.quantizer)
    method = {"pissa_r8": "PiSSA", "loftq_r8": "LoftQ"}[adapter]
    base = "a base" if quantizer == "none" else "a quantized base"
    says = (
        rf"^{method} on {base} without the first stage: transformer\.h\.0\.attn\.c_attn and 7 more$"
    )
    with pytest.raises(ValueError, match=says):
        adapter_of(spec.adapter).apply(model, 0, {})


@preparing
def test_one_layer_left_out_is_named(adapter: str) -> None:
    spec = spec_of(LLAMA, adapter, "nf4")
    model = skeleton(spec)
    stage = first_stage(spec, model)
    assert stage is not None
    loading.stream(model, source(spec, model, None), spec.quantizer, CPU, None, stage)
    assert all(each.device == CPU for state in stage.prepared.values() for each in state.values())
    del stage.prepared["model.layers.1.mlp.up_proj"]
    with pytest.raises(
        ValueError, match=r"first stage: model\.layers\.1\.mlp\.up_proj and 0 more$"
    ):
        adapter_of(spec.adapter).apply(model, 0, stage.prepared)


# Resumed and divided runs.

STEPS = 4


def trained(
    spec: Any, folder: Path, stop_after: int | None = None
) -> tuple[list[float], dict[str, str]]:
    """Losses, and images of what is exported."""
    seen: list[Any] = []
    control = Control(
        seen.append, lambda: stop_after is not None and len(seen) >= stop_after, folder
    )
    model = make(spec).model
    losses = [
        row["loss"] for row in train(model, random_examples(0, 20), spec, CPU, control).losses
    ]
    where = folder / "weights"
    where.mkdir(parents=True)
    adapter_of(spec.adapter).export(model, where)
    return losses, {path.name: path.read_bytes().hex() for path in where.iterdir()}


@preparing
@pytest.mark.parametrize("engine", [pytest.param("deepspeed", marks=pytest.mark.slow), "ddp"])
def test_a_resumed_run_exports_what_a_whole_one_does(
    adapter: str, engine: str, tmp_path: Path
) -> None:
    few = {"max_steps": STEPS, "warmup_steps": 0, "global_batch_size": 4, "lr": 1e-2}
    spec = spec_of(LLAMA, adapter, "nf4", **few, engine=engine)
    whole = trained(spec, tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(spec, tmp_path / "cut", stop_after=2)
    runtime.setup(123, 2)
    assert trained(spec, tmp_path / "cut") == whole
    assert len(set(whole[0])) == STEPS


@pytest.mark.slow
@preparing
def test_at_stage_3_two_ranks_start_from_the_same_and_train_as_one(
    adapter: str, tmp_path: Path
) -> None:
    on_ranks(PROGRAMS / "two_ranks_loading.py", "nf4", tmp_path, adapter)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank in found:
        assert (
            rank["3"]["losses"] == pytest.approx(rank["0"]["losses"], rel=1e-5)
            and len(rank["0"]["losses"]) == 3
        )
        assert rank["3"]["losses"] == found[0]["3"]["losses"]
        assert rank["3"]["held"] <= 0.51 * rank["0"]["held"]
        assert rank["3"]["base_bytes"] == rank["0"]["base_bytes"]


# The decomposition, against NumPy's in double precision.


def decaying(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall as 1 / k, about as those of trained weights do."""
    draw = np.random.default_rng(seed)
    u, _ = np.linalg.qr(draw.normal(size=(rows, rows)))
    v, _ = np.linalg.qr(draw.normal(size=(columns, columns)))
    k = min(rows, columns)
    return torch.from_numpy(((u[:, :k] / np.arange(1, k + 1)) @ v[:k]).astype(np.float32))


def reference(matrix: Tensor, r: int) -> tuple[np.ndarray, np.ndarray]:
    """A and B by their definition, the signs by the rule."""
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    a, b = np.sqrt(s[:r])[:, None] * vh[:r], u[:, :r] * np.sqrt(s[:r])
    for k in range(r):
        if b[np.abs(b[:, k]).argmax(), k] < 0:
            a[k], b[:, k] = -a[k], -b[:, k]
    return a, b


def are_the_principal_factors(
    a: Tensor, b: Tensor, matrix: Tensor, r: int, tolerance: float = 1e-4
) -> None:
    """A (r, in) and B (out, r), each vector with its own sign."""
    for mine, theirs in zip((a, b), reference(matrix, r), strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, torch.from_numpy(theirs), tolerance)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
@pytest.mark.parametrize("svd_niter", [None, 8])
def test_the_factors_are_the_definitions_signs_included(
    shape: tuple[int, int], svd_niter: int | None
) -> None:
    matrix = decaying(*shape)
    a, b = principal_factors(matrix, 6, svd_niter, 0)
    are_the_principal_factors(a, b, matrix, 6)
    broken(are_the_principal_factors, -a, -b, matrix, 6)
    broken(are_the_principal_factors, 2 * a, b / 2, matrix, 6)
    whole = principal_factors(matrix, min(shape), svd_niter, 0)
    assert_close(whole[1] @ whole[0], matrix)


def test_a_matrix_of_low_rank_is_found_by_chance_alone_and_zero_stays_zero() -> None:
    matrix = decaying(64, 4) @ decaying(4, 48)
    a, b = principal_factors(matrix, 4, 0, 7)
    assert_close(b @ a, matrix)
    for svd_niter in (None, 2):
        assert not any(each.any() for each in principal_factors(torch.zeros(8, 6), 3, svd_niter, 0))


def test_the_randomised_decomposition_draws_from_a_generator_of_its_own() -> None:
    matrix, state = (
        torch.randn(40, 60, generator=torch.Generator().manual_seed(1)),
        torch.get_rng_state(),
    )
    first = principal_factors(matrix, 4, 1, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other, full = (
        principal_factors(matrix, 4, niter, seed) for niter, seed in ((1, 0), (1, 1), (None, 0))
    )
    named = [images(zip("ab", each, strict=True)) for each in (first, again, other, full)]
    assert named[0] == named[1] and len({each["a"] for each in named}) == 3
    assert images(zip("ab", principal_factors(matrix, 4, None, 1), strict=True)) == named[3]
    rest = [float((matrix - b @ a).norm()) for a, b in (first, full)]
    assert rest[1] <= rest[0] < 1.05 * rest[1], "almost as near as the nearest"
