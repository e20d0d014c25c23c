"""Low-rank layers. The law: B A is the best approximation of the dense weight, evenly shared; a
low-rank model has the parameters that arithmetic says, and goes through every quantizer,
adapter, checkpoint and export as a dense one does."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import (
    ADAPTERS,
    CPU,
    all_logits,
    assert_close,
    broken,
    images,
    make,
    process,  # noqa: F401
    spec_of,
    stir,
    tiny,
)
from fixtures.process import one_line
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from finrepro.catalogue import footprint, reader
from finrepro.catalogue.compatibility import refusal
from finrepro.catalogue.resolve import base_of
from finrepro.catalogue.spec import Model
from finrepro.errors import EnvironmentFault, UsageError
from finrepro.kinds import adapter_of, kind_module
from finrepro.methods.layers.linear import is_conv1d, linear_layers
from finrepro.methods.layers.low_rank import (
    LowRankLinear,
    SplitLowRankLinear,
    dense_weight,
    factors,
    fill,
    low_rank_layers,
)
from finrepro.models import factorize, loading
from finrepro.models.build import build, dense_skeleton, load, skeleton
from finrepro.sizes.low_rank import LowRank, break_even, factor_sizes, solve
from finrepro.sizes.shapes import block_sizes, dense_sizes, depth, other_parameters, rank

GPT2, LLAMA = "gpt2_127m_mini", "llama3_1_8b_mini"
LOW_RANK = tuple(name for name in reader.entries("models") if reader.model(name).low_rank)
IDS = list(range(30, 60))


def chosen(**changes: Any) -> LowRank:
    plain: dict[str, Any] = {
        "rank": 16,
        "targets": "all-linear",
        "split_qkv": False,
        "multiple_of": 1,
        "rescale": False,
        "svd_niter": None,
    }
    return LowRank(**plain | changes)


def small(name: str = GPT2, **changes: Any) -> Model:
    """A tiny model of the family whose layers are of rank 16."""
    model = dataclasses.replace(tiny(name), low_rank=chosen(**changes))
    linear = sum(i * o for i, o in block_sizes(model).values()) * depth(model)
    return dataclasses.replace(model, parameters=other_parameters(model) + linear)


def dense_of(model: Model) -> Model:
    """The same architecture, not factored."""
    return dataclasses.replace(model, low_rank=None)


def upright(layer: Any) -> np.ndarray:
    """The weight of a dense layer as (out, in)."""
    weight = layer.weight.detach().double().numpy()
    return weight.T if is_conv1d(layer) else weight


def pairs_with_weights(
    low: nn.Module, dense: nn.Module
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, str]]:
    """(A, B, the dense weight that they stand for, name) of every factor pair."""
    layers, found = linear_layers(dense), []
    for name, pair in low_rank_layers(low).items():
        part = name.rpartition(".")[2]
        weight = upright(layers[name if part not in "qkv" else name.rpartition(".")[0]])
        if part in "qkv":
            weight = np.split(weight, 3)["qkv".index(part)]
        found.append(
            (*(each.weight.detach().double().numpy() for each in (pair.a, pair.b)), weight, name)
        )
    return found


# The weights: spectral initialisation and decomposition.


def nearest_of_its_rank(a: np.ndarray, b: np.ndarray, weight: np.ndarray, name: str = "") -> None:
    """Eckart and Young: ||W - B A||^2 is the sum of the squared singular values that are left
    out.
    """
    left_out = np.linalg.svd(weight, compute_uv=False)[len(a) :]
    error, best = np.linalg.norm(weight - b @ a) ** 2, (left_out**2).sum()
    assert abs(error - best) <= 1e-5 * np.linalg.norm(weight) ** 2, name


def evenly_shared(a: np.ndarray, b: np.ndarray) -> None:
    """B^T B = A A^T."""
    assert np.linalg.norm(b.T @ b - a @ a.T) <= 1e-5 * np.linalg.norm(a @ a.T)


@pytest.mark.parametrize(("name", "split"), [(GPT2, False), (GPT2, True), (LLAMA, False)])
def test_the_factors_are_the_nearest_of_their_rank_to_the_weights_that_were_drawn(
    name: str, split: bool
) -> None:
    model = small(name, split_qkv=split)
    low, dense = load(spec_of(model), None), load(spec_of(dense_of(model)), None)
    found = pairs_with_weights(low, dense)
    assert len(found) == depth(model) * (len(dense_sizes(model)) + 2 * split)
    for a, b, weight, each in found:
        assert a.shape == (16, weight.shape[1]) and b.shape == (weight.shape[0], 16)
        nearest_of_its_rank(a, b, weight, each)
        evenly_shared(a, b)
        broken(nearest_of_its_rank, a, b * 1.1, weight)
        broken(nearest_of_its_rank, a[::-1], b, weight)
        broken(evenly_shared, a * 2, b / 2)
    for (
        key,
        value,
    ) in dense.named_parameters():  # embeddings, norms and biases are those of the dense model
        if key in dict(low.named_parameters()):
            assert torch.equal(value, low.get_parameter(key)), key
    a, b, weight, _ = found[0]
    u, s, vh = np.linalg.svd(weight)  # the mutant that takes the smallest directions
    broken(
        nearest_of_its_rank,
        np.sqrt(s[-16:, None]) * vh[-16:],
        u[:, -16:] * np.sqrt(s[-16:]),
        weight,
    )


def test_a_randomised_decomposition_comes_near_the_exact_one_and_is_as_even() -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(3)).double().numpy()
    exact = np.linalg.norm(np.linalg.svd(weight, compute_uv=False)[24:])
    for niter, share in ((2, 1.03), (6, 1.006)):
        a, b = (
            each.double().numpy() for each in factors(torch.from_numpy(weight), 24, niter, False, 0)
        )
        assert exact <= np.linalg.norm(weight - b @ a) <= share * exact
        evenly_shared(a, b)


def spread(a: Tensor, b: Tensor, std: float) -> None:
    """The entries of B A have the standard deviation of a dense weight, within 3 %."""
    assert abs(float((b @ a).std()) / std - 1) <= 0.03


@pytest.mark.parametrize(
    ("inputs", "outputs", "r"), [(256, 768, 64), (512, 256, 16), (384, 384, 128)]
)
def test_rescaled_the_product_is_as_large_as_the_dense_weight(
    inputs: int, outputs: int, r: int
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    weight = 0.02 * torch.randn(outputs, inputs, generator=generator)
    a, b = factors(weight, r, None, True, 0)
    spread(a, b, 0.02)
    evenly_shared(a.double().numpy(), b.double().numpy())
    broken(
        spread, *factors(weight, r, None, False, 0), 0.02
    )  # not rescaled: less than the dense weight
    kept = torch.linalg.svdvals(weight.double())
    share = float((kept[:r].square().sum() / kept.square().sum()).sqrt())
    plain_a, plain_b = factors(weight, r, None, False, 0)
    assert (
        abs(
            float(torch.linalg.matrix_norm(plain_b @ plain_a) / torch.linalg.matrix_norm(weight))
            - share
        )
        <= 1e-5
    )
    drawn = [
        0.02 * torch.randn(shape, generator=generator) for shape in ((r, inputs), (outputs, r))
    ]
    broken(spread, *drawn, 0.02)  # GPT-2's 0.02 for both factors: the published mistake


def residual_scaling(model: Model, shrink: float = 1.0) -> None:
    """What is added to the residual stream begins 1 / sqrt(2 L) as large as the rest, in the
    product of the factors.
    """
    found = low_rank_layers(load(spec_of(model), None))
    norm = {
        kind: torch.stack(
            [(dense_weight(pair)[0]).std() for name, pair in found.items() if name.endswith(kind)]
        ).mean()
        for kind in ("c_attn", "c_proj")
    }
    expected = shrink / math.sqrt(2 * depth(model))
    assert abs(float(norm["c_proj"] / norm["c_attn"]) / expected - 1) < 0.05


def test_the_residual_scaling_of_the_projections_comes_along() -> None:
    model = small(rescale=True)
    residual_scaling(model)
    broken(
        residual_scaling, model, shrink=math.sqrt(2 * depth(model))
    )  # as if every layer were drawn alike


def test_one_seed_is_one_model() -> None:
    spec = spec_of(small())
    first, again, other = (
        load(each, None) for each in (spec, spec, dataclasses.replace(spec, seed=1))
    )
    assert images(first.named_parameters()) == images(again.named_parameters())
    assert images(first.named_parameters()) != images(other.named_parameters())


# Checkpoints: dense ones are decomposed, factors are read as they are.


def saved(model: nn.Module, folder: Path) -> Path:
    """The checkpoint that a run of the whole model leaves."""
    adapter_of(reader.adapter("full")).export(model, folder)
    return folder


def of_rank(model: Model, r: int, folder: Path) -> Any:
    """The trained weights in `folder` as a low-rank model of any rank, also one that saves
    nothing.
    """
    spec, low_rank = spec_of(model), chosen()
    low = factorize.restructured(dense_skeleton(spec), low_rank, r)
    dense = dense_skeleton(spec)
    source = factorize.Factored(dense, loading.Checkpoint(dense, folder, model.name), low_rank, 0)
    loading.stream(low, source, None, CPU)
    return low.eval()


def the_dense_logits(found: nn.Module, dense: nn.Module) -> None:
    """The decomposition of full rank computes what the dense model computes."""
    assert_close(all_logits(found, IDS), all_logits(dense, IDS), 1e-4)


@pytest.mark.parametrize("name", [GPT2, LLAMA])
@torch.no_grad()
def test_decomposed_at_full_rank_a_trained_model_is_itself_and_below_it_is_off_by_ever_more(
    name: str, tmp_path: Path
) -> None:
    model = tiny(name)
    dense = stir(load(spec_of(model), None)).eval()
    folder = saved(dense, tmp_path)
    full = min(min(size) for size in block_sizes(model).values())
    if name == GPT2:  # every layer has this rank; Llama's differ
        the_dense_logits(of_rank(model, full, folder), dense)
        broken(the_dense_logits, of_rank(model, full // 2, folder), dense)
    layers, errors = linear_layers(dense), []
    for r in (full // 4, full // 2, full):
        found = low_rank_layers(of_rank(model, r, folder))
        off = [
            upright(layers[each]) - dense_weight(pair)[0].double().numpy()
            for each, pair in found.items()
        ]
        errors.append([np.linalg.norm(each) for each in off])
    assert (np.diff(np.array(errors), axis=0) < 0).all()


@torch.no_grad()
def test_a_checkpoint_of_factors_is_read_as_it_is_and_a_dense_one_is_decomposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    spec = spec_of(model)
    trained = stir(load(spec, None))
    folder = saved(trained, tmp_path / "factors")
    monkeypatch.setattr(
        "finrepro.methods.layers.low_rank.principal_factors", None
    )  # whoever decomposes fails
    assert images(load(spec, folder).named_parameters()) == images(trained.named_parameters())
    with pytest.raises(TypeError):
        load(spec, None)
    monkeypatch.undo()
    dense = factorize.to_dense(load(spec, folder), dense_skeleton(spec))
    assert "finrepro_low_rank" not in dense.config.to_dict()
    again = load(
        spec, saved(dense, tmp_path / "dense")
    ).eval()  # its rank is the model's own: nothing is lost
    assert_close(all_logits(again, IDS), all_logits(trained.eval(), IDS), 1e-4)
    for a, b, weight, name in pairs_with_weights(again, dense):
        nearest_of_its_rank(a, b, weight, name)


def test_factors_of_another_rank_or_with_a_tensor_too_few_are_refused(tmp_path: Path) -> None:
    spec = spec_of(small())
    folder = saved(load(spec, None), tmp_path)
    with pytest.raises(
        EnvironmentFault, match=r"shape of .*c_attn\.a\.weight is \[16, 64\].* has \[8, 64\]"
    ) as refused:
        load(spec_of(small(rank=8)), folder)
    one_line(refused.value)
    with pytest.raises(
        EnvironmentFault, match=r"has no tensor .*q\.a\.weight|has no tensor .*c_attn\.weight"
    ):
        load(spec_of(small(split_qkv=True)), folder)
    with pytest.raises(EnvironmentFault, match=r"has no tensor .*c_attn\.weight"):
        load(spec_of(dense_of(small())), folder)  # a low-rank checkpoint is no dense model's
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("c_fc.b.weight"))
    save_file(
        {key: value for key, value in tensors.items() if key != name},
        path,
        metadata={"format": "pt"},
    )
    with pytest.raises(EnvironmentFault, match=r"has no tensor .*c_fc\.b\.weight"):
        load(spec, folder)


def test_no_part_of_the_dense_model_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = factorize.Factored.__init__

    def keep(self: Any, dense: Any, *arguments: Any) -> None:
        made.append(dense)
        original(self, dense, *arguments)

    monkeypatch.setattr(factorize.Factored, "__init__", keep)
    model = load(spec_of(small()), None)
    assert len(made) == 1 and all(parameter.is_meta for parameter in made[0].parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())


# The layer.


def computes(layer: nn.Module, dense: nn.Module, inputs: int) -> None:
    """Y = x A^T B^T + b, whichever way the dense layer stores its weight."""
    x = torch.randn(3, 5, inputs, generator=torch.Generator().manual_seed(0))
    assert_close(layer(x), dense(x), 1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(48, 144), (96, 24), (48, 48)])
@torch.no_grad()
def test_gpt2s_stored_transpose_becomes_factors_of_the_right_order(
    inputs: int, outputs: int
) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    dense = Conv1D(outputs, inputs)
    dense.bias.normal_()
    layer = LowRankLinear(inputs, outputs, min(inputs, outputs))
    fill(layer, dense.weight.T, dense.bias, svd_niter=None, rescale=False, seed=0)
    computes(layer, dense, inputs)
    if inputs == outputs:  # where the shapes do not tell, the numbers do
        fill(layer, dense.weight, dense.bias, svd_niter=None, rescale=False, seed=0)
        broken(computes, layer, dense, inputs)
    split = SplitLowRankLinear(inputs, outputs, min(inputs, outputs // 3))
    if inputs >= outputs // 3:
        fill(split, dense.weight.T, dense.bias, svd_niter=None, rescale=False, seed=0)
        computes(split, dense, inputs)
        split.q, split.k = split.k, split.q
        broken(computes, split, dense, inputs)
    weight, bias = dense_weight(layer)
    assert weight.shape == (outputs, inputs) and torch.equal(bias, dense.bias)


def operations(layer: nn.Module, expected: int, positions: int = 7) -> None:
    """Floating-point operations of a forward pass, as PyTorch counts them, a position."""
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(positions, layer.in_features))
    assert counter.get_total_flops() == expected * positions


@pytest.mark.parametrize(("i", "o", "r"), [(64, 192, 16), (256, 64, 8)])
def test_a_layer_takes_2_r_times_in_and_out_operations_a_position(i: int, o: int, r: int) -> None:
    operations(LowRankLinear(i, o, r), 2 * r * (i + o))
    operations(SplitLowRankLinear(i, 3 * o, r), 3 * 2 * r * (i + o))
    broken(operations, nn.Linear(i, o), 2 * r * (i + o))


@torch.no_grad()
def test_token_by_token_it_computes_what_it_computes_at_once() -> None:
    model = load(spec_of(small()), None).eval()
    cache, found = None, []
    for token in IDS:
        out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits[0, -1])
    assert_close(torch.stack(found), all_logits(model, IDS), 1e-5)


# The arithmetic.


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * name.startswith("gpt2_1_5b_lr_r"))
        for name in LOW_RANK
    ],
)
def test_an_entry_has_as_many_parameters_as_arithmetic_and_the_built_model_say(name: str) -> None:
    """With the tied head and the biases; the names and sizes of the layers are those of the
    model.
    """
    entry = reader.model(name)
    sizes = block_sizes(entry)
    assert entry.parameters == other_parameters(entry) + depth(entry) * sum(
        i * o for i, o in sizes.values()
    )
    model = skeleton(spec_of(entry))
    assert entry.parameters == sum(math.prod(shape) for shape in loading.shapes(model).values())
    layers = linear_layers(model)
    assert len(layers) == depth(entry) * len(sizes)
    for each, layer in layers.items():
        inside = next(size for key, size in sizes.items() if each.endswith(f".{key}"))
        assert tuple(layer.weight.shape) == inside[::-1]


@pytest.mark.parametrize(
    ("name", "r", "linear", "total", "ratio"),  # computed by hand, in millions
    [
        ("gpt2_127m", 48, 7.08, 46.6, 2.67),
        ("gpt2_127m", 192, 28.31, 67.8, 1.83),
        ("gpt2_127m", 256, 37.75, 77.3, 1.61),
        ("gpt2_1_5b", 200, 245.8, 328.8, 4.74),
        ("gpt2_1_5b", 400, 491.5, 574.6, 2.71),
        ("gpt2_1_5b", 533, 655.0, 738.0, 2.11),
    ],
)
def test_the_sizes_are_the_published_arithmetic(
    name: str, r: int, linear: float, total: float, ratio: float
) -> None:
    dense = reader.model(name)
    model = dataclasses.replace(dense, low_rank=chosen(rank=r))
    factors_of = depth(model) * sum(i * o for i, o in block_sizes(model).values())
    whole = factors_of + other_parameters(model)
    assert abs(factors_of / 1e6 - linear) <= 0.06 and abs(whole / 1e6 - total) <= 0.06
    assert abs(dense.parameters / whole - ratio) <= 0.006
    split = dataclasses.replace(dense, low_rank=chosen(rank=r, split_qkv=True))
    width = dense.architecture["n_embd"]  # 18 n r a block instead of 16
    assert sum(i * o for i, o in block_sizes(split).values()) == 18 * width * r


def test_the_ranks_that_the_papers_compression_implies() -> None:
    assert rank(reader.model("gpt2_1_5b_lr_2_64x")) == 413
    assert rank(reader.model("gpt2_127m_lr_2_64x")) == 52
    dense = reader.model("gpt2_1_5b")
    separate = dataclasses.replace(
        dense, low_rank=chosen(rank=None, compression=2.64, split_qkv=True)
    )
    assert rank(separate) == 367


@pytest.mark.parametrize(
    ("low", "dense"),
    [
        ("gpt2_127m_lr_2_64x", "gpt2_127m_equal"),
        ("gpt2_1_5b_lr_2_64x", "gpt2_1_5b_equal"),
        ("gpt2_127m_mini_lr", "gpt2_127m_mini_equal"),
        ("gpt2_1_5b_mini_lr", "gpt2_1_5b_mini_equal"),
    ],
)
def test_the_dense_model_to_be_held_against_is_of_equal_size(low: str, dense: str) -> None:
    one, other = reader.model(low), reader.model(dense)
    assert other.low_rank is None and abs(one.parameters / other.parameters - 1) <= 0.005


@pytest.mark.parametrize("seed", range(4))
def test_the_solved_rank_is_the_nearest_that_there_is(seed: int) -> None:
    generator = np.random.default_rng(seed)
    dense = {
        f"l{k}": tuple(int(each) for each in generator.integers(300, 900, 2)) for k in range(3)
    }
    blocks, others, step = 5, int(generator.integers(0, 10**6)), int(generator.integers(1, 4))
    whole = others + blocks * sum(i * o for i, o in dense.values())
    sizes = {
        r: others + blocks * sum(i * o for i, o in factor_sizes(chosen(), dense, r).values())
        for r in range(step, int(min(break_even(*each) for each in dense.values())), step)
    }
    for wanted in generator.choice(list(sizes), 5):
        asked = sizes[int(wanted)] + int(generator.integers(-300, 300))
        best = min(sizes, key=lambda r: abs(sizes[r] - asked))
        for said in ({"total_parameters": asked}, {"compression": whole / asked}):
            assert solve(chosen(rank=None, multiple_of=step, **said), dense, blocks, others) == best


PLAIN = {
    "rank": 16,
    "targets": "all-linear",
    "split_qkv": False,
    "multiple_of": 1,
    "rescale": False,
    "svd_niter": None,
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": None}, r"exactly one of rank, compression and total_parameters \(got none\)"),
        ({"compression": 2.0}, r"got rank and compression"),
        ({"rank": 0}, "greater than 0"),
        ({"rank": 48, "multiple_of": 64}, "rank 48 is no multiple of 64"),
        (
            {"rank": 384},
            r"rank 384 saves nothing in attn.c_proj \(768 in, 768 out\): "
            r"its break-even rank is 384",
        ),
        (
            {"rank": None, "compression": 4.0},
            r"39,505,152 of 124,439,808 .*embeddings.* caps the compression at 3.15",
        ),
        (
            {"rank": None, "compression": 2.64, "multiple_of": 64},
            r"no rank that is a multiple of 64 .*rank 64 gives 2.54",
        ),
        ({"rank": None, "compression": 1.0}, "greater than 1"),
        ({"rank": None, "compression": 1.1}, "saves nothing in attn.c_proj"),
        (
            {"rank": None, "total_parameters": 200_000_000},
            "the dense model has 124,439,808 already",
        ),
        ({"targets": ["c_atn"]}, "no linear layer is named c_atn; there are c_attn, c_fc, c_proj"),
        ({"targets": []}, "names no layer"),
        ({"targets": ["c_fc"], "split_qkv": True}, "no fused attn.c_attn"),
        ({"ranks": 3}, "unknown setting|Unexpected"),
        ({"of": "gpt2_1_5b"}, "gpt2_1_5b is not the dense model of the same architecture"),
        ({"of": "gpt2_128m"}, "unknown model 'gpt2_128m'.*gpt2_127m"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = reader.entries("models")
    entry = {**entries["gpt2_127m_lr_r256"], "low_rank": {**PLAIN, **changes}}
    monkeypatch.setitem(entries, "x", entry)
    with pytest.raises(UsageError, match=says) as refused:
        reader.model.__wrapped__("x")
    assert one_line(refused.value).startswith(("models.x", "unknown model"))


def test_what_a_low_rank_model_is_decides_its_runs() -> None:
    dense = spec_of(dense_of(small()))
    models = [
        small(),
        small(rank=8),
        small(split_qkv=True),
        small(rescale=True),
        small(targets=("c_attn",)),
    ]
    models += [small(rank=None, total_parameters=size) for size in (59_136, 67_328)]
    specs = [dense, *(spec_of(each) for each in models)]
    assert len({each.run_id for each in specs}) == len(specs)
    assert (
        spec_of(small(of="one")).run_id == spec_of(small(of="another")).run_id
    )  # the run that made the base says which


# Beside quantizers and adapters.


def misaligned(spec: Any) -> None:
    reason = refusal(spec)
    assert reason is not None and "\n" not in reason
    assert (
        "blocks of 64 do not divide rows of" in reason
        and ".b): take a rank that they divide" in reason
    )


def test_factors_whose_rows_4_bit_blocks_would_cross_are_refused_by_name() -> None:
    """B's rows are as long as the rank."""
    for r in (48, 37):
        model = dataclasses.replace(reader.model(GPT2), low_rank=chosen(rank=r))
        for quantizer in ("nf4", "fp4", "icq"):
            misaligned(spec_of(model, "lora_r8", quantizer))
        for quantizer in ("none", "int8"):
            assert refusal(spec_of(model, "lora_r8", quantizer)) is None
    broken(misaligned, spec_of(reader.model("gpt2_127m_mini_lr_r64"), "lora_r8", "nf4"))
    broken(misaligned, spec_of(reader.model("gpt2_1_5b_lr_r384"), "lora_r8", "icq"))
    misaligned(spec_of(reader.model("gpt2_1_5b_lr_2_64x"), "lora_r8", "nf4"))


@pytest.mark.parametrize("rank", [96, 352])
def test_rows_that_bitsandbytes_would_read_with_other_blocks_scales_are_refused(rank: int) -> None:
    """Multiples of 16 and not of a block: on CPUs with AVX-512 bitsandbytes takes them, and loses
    a quarter of the weight.
    """
    model = dataclasses.replace(reader.model("gpt2_1_5b"), low_rank=chosen(rank=rank))
    for quantizer in ("nf4", "nf4_single", "fp4", "icq"):
        misaligned(spec_of(model, "lora_r8", quantizer))


@pytest.mark.parametrize("quantizer", ["none", "int8", "nf4", "icq"])
def test_the_factors_are_what_is_quantized_and_as_many_bytes_as_planned(quantizer: str) -> None:
    spec = spec_of(reader.model("gpt2_127m_mini_lr_r64"), "lora_r8", quantizer)
    built = make(spec)
    assert (
        built.base_bytes == footprint.base_bytes(spec)
        and built.base_parameters == spec.model.parameters
    )
    assert (
        built.trainable_parameters
        == footprint.sizes(spec)["trainable_params"]
        == 2 * 8 * (1792 + 384 + 256)
    )
    if quantizer == "none":
        return
    exact = load(
        dataclasses.replace(spec, quantizer=reader.quantizer("none", "float32")), None
    ).eval()
    assert_close(all_logits(built.model.eval(), IDS), all_logits(exact, IDS), 0.2)


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] * (name not in ("lora_r8", "pissa_r8", "houlsby_m64"))
        )
        for name in ADAPTERS
    ],
)
def test_every_adapter_goes_onto_factors_and_its_parameters_are_counted(adapter: str) -> None:
    spec = spec_of(
        reader.model("gpt2_127m_mini_lr_r64"),
        adapter,
        "nf4" if adapter.startswith("loftq") else "none",
    )
    if refusal(spec):
        pytest.skip(str(refusal(spec)))
    built = make(spec)
    assert built.trainable_parameters == footprint.sizes(spec)["trainable_params"]
    if adapter == "base" or getattr(
        kind_module("adapters", spec.adapter.kind), "WHOLE_MODEL", False
    ):
        return
    built.model(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.backward()
    learn = {
        name
        for name, each in built.model.named_parameters()
        if each.requires_grad and each.grad is not None
    }
    assert learn and all(".h." in name for name in learn)
    if adapter.startswith("lora_"):
        assert {
            part
            for part in ("c_attn.a.", "c_attn.b.", "c_fc.a.", "c_fc.b.")
            if any(part in each for each in learn)
        } == {"c_attn.a.", "c_attn.b.", "c_fc.a.", "c_fc.b."}


# As runs.


def test_an_entry_that_decomposes_another_starts_from_its_run(tmp_path: Path) -> None:
    name = "gpt2_127m_mini_svd_r64"
    model, dense = reader.model(name), reader.model(GPT2)
    assert base_of(name) == base_of(GPT2) and reader.origin(model) == dense
    assert reader.origin(reader.model("gpt2_127m_mini_lr")).name == "gpt2_127m_mini_lr"
    trained = stir(load(spec_of(dense), None))
    low = build(spec_of(model), saved(trained, tmp_path), CPU).model
    found = pairs_with_weights(low, trained)
    assert len(found) == 2 * 3
    for a, b, weight, each in found:
        nearest_of_its_rank(a, b, weight, each)
