"""Quantizers. The law: what is stored is what the method's paper says - its code book, its blocks, its bits -, a layer multiplies with what
the codes stand for, and no pass of any kind changes a stored bit."""

import copy
import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_model import (
    MINIATURES,
    QUANTIZERS,
    all_logits,
    assert_close,
    broken,
    images,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stirred,
)
from scipy.stats import norm
from torch import Tensor, nn

from finrepro import catalogue
from finrepro.errors import UsageError
from finrepro.layers.linear import linear_layers
from finrepro.model import load, quantize, stored_bytes
from finrepro.quantizers import bnb_4bit
from finrepro.schema import Choice, build, kind_module, kinds
from finrepro.scoring import text_log_likelihoods

# reference/methods.md 2.1: the sixteen levels of NormalFloat4, and those of FP4 in the order of their bit patterns
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3))
CODE_BOOKS = {"nf4": NF4, "fp4": FP4}
BLOCKS = (32, 64, 128, 256)


def settings(**changes: Any) -> bnb_4bit.Config:
    """The catalogue's NF4, in float32, changed."""
    return dataclasses.replace(catalogue.quantizer("nf4", "float32").config, **changes)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(stored: bnb_4bit.Stored) -> np.ndarray:
    """The sixteen-valued codes in the order of the weights: the first of a byte is its high half."""
    packed = stored.codes.view(torch.uint8).flatten().numpy()
    return np.stack([packed >> 4, packed & 15], axis=1).flatten()


# --- the settings ---------------------------------------------------------------------------------------------------------------------


def test_every_quantizer_has_an_entry_and_the_two_of_today_are_there() -> None:
    assert {catalogue.quantizer(name, "float32").kind for name in QUANTIZERS} == set(kinds("quantizers"))
    assert set(kinds("quantizers")) >= {"none", "bnb_4bit"}


@pytest.mark.parametrize("kind", kinds("quantizers"))
def test_no_setting_of_a_quantizer_has_a_default(kind: str) -> None:
    for field in dataclasses.fields(kind_module("quantizers", kind).Config):
        assert field.default is field.default_factory is dataclasses.MISSING, field.name


@pytest.mark.parametrize("missing", [field.name for field in dataclasses.fields(bnb_4bit.Config)])
def test_a_setting_left_out_is_an_error_and_not_the_librarys_default(missing: str) -> None:
    values = {key: value for key, value in dataclasses.asdict(settings()).items() if key != missing}
    with pytest.raises(UsageError, match=missing):
        build(bnb_4bit.Config, values, "quantizers.x")


def test_a_layers_settings_are_those_of_the_entry_and_not_the_librarys() -> None:
    config = settings(compute_dtype="bfloat16", block_size=128)
    layer: Any = bnb_4bit.linear(bnb_4bit.encode(gaussian(64, 128), config), None)
    state = layer.weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 128, True)
    assert layer.compute_dtype == torch.bfloat16
    assert layer.weight.dtype == torch.uint8
    assert not layer.weight.requires_grad


@pytest.mark.parametrize(("dtype", "name"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_the_compute_dtype_of_the_entry_is_the_models(dtype: str, name: str) -> None:
    assert catalogue.quantizer("nf4", dtype).config.compute_dtype == name


# --- the codes ------------------------------------------------------------------------------------------------------------------------


def test_nf4s_code_book_is_the_papers() -> None:
    book = bnb_4bit.encode(gaussian(64, 64), settings()).state.code.double().numpy()
    assert np.abs(book - NF4).max() < 1e-7
    assert (np.diff(book) > 0).all() and book[7] == 0 and -book[0] == book[15] == 1
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    again = np.sort([*positive, 0, *negative])
    assert np.abs(book - again / again.max()).max() < 1e-6


def test_fp4s_code_book_is_in_the_order_of_its_bit_patterns() -> None:
    book = bnb_4bit.encode(gaussian(64, 64), settings(quant_type="fp4")).state.code.double().numpy()
    assert np.abs(book - FP4).max() < 1e-4  # the library writes 0.0052 for 0.0625 / 12
    assert not (np.diff(book) > 0).all()


def reference_codes(values: np.ndarray, book: tuple[float, ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest level of each value over its block's largest magnitude, and whether it is near no mid-point, where ties are open."""
    scaled = (values.reshape(-1, block) / np.abs(values.reshape(-1, block)).max(1, keepdims=True)).flatten()
    order = np.argsort(book)
    levels = np.asarray(book)[order]
    middles = (levels[1:] + levels[:-1]) / 2
    position = np.searchsorted(middles, scaled)
    near = np.abs(scaled[:, None] - middles).min(1) < 1e-4 if len(book) else None
    return order[position], ~near


def codes_are_the_nearest_levels(weight: Tensor, config: bnb_4bit.Config, book: tuple[float, ...]) -> None:
    """The library's codes are those of a quantizer written down from its definition."""
    found = codes(bnb_4bit.encode(weight, config))
    expected, clear = reference_codes(weight.double().numpy().flatten(), book, config.block_size)
    assert clear.mean() > 0.99
    assert (found[clear] == expected[clear]).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("quant_type", CODE_BOOKS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_codes_are_those_of_a_reference_quantizer(quant_type: str, block: int, double_quant: bool) -> None:
    weight = gaussian(512, 512) * torch.logspace(-4, 2, 512)[:, None]
    config = settings(quant_type=quant_type, block_size=block, double_quant=double_quant)
    codes_are_the_nearest_levels(weight, config, CODE_BOOKS[quant_type])
    broken(codes_are_the_nearest_levels, weight, config, tuple(np.linspace(-1, 1, 16)))
    other = dataclasses.replace(config, block_size=block * 2)
    with pytest.raises(AssertionError):
        assert (codes(bnb_4bit.encode(weight, other)) == codes(bnb_4bit.encode(weight, config))).all()


@pytest.mark.parametrize("shape", [(2304, 768), (1024, 4096), (4096, 128), (128, 14336)])
def test_the_codes_of_the_real_models_shapes_are_those_of_the_reference(shape: tuple[int, int]) -> None:
    codes_are_the_nearest_levels(gaussian(*shape), settings(), NF4)


def recoding_changes_nothing(weight: Tensor, recode: Any) -> None:
    """What is encoded again after decoding has the same codes; FP4's two zeros are one number."""
    once, twice = (codes(stored) for stored in recode(weight))
    levels = [np.where(each == 8, 0, each) if recode.two_zeros else each for each in (once, twice)]
    assert (levels[0] == levels[1]).all()


@dataclasses.dataclass(frozen=True)
class Recode:
    """Encodes a weight, and encodes what that stands for, with a relative noise in between."""

    config: bnb_4bit.Config
    noise: float = 0.0

    @property
    def two_zeros(self) -> bool:
        return self.config.quant_type == "fp4"

    def __call__(self, weight: Tensor) -> list[bnb_4bit.Stored]:
        once = bnb_4bit.encode(weight, self.config)
        heard = bnb_4bit.decode(once) * (1 + self.noise * gaussian(*weight.shape, seed=5))
        return [once, bnb_4bit.encode(heard, self.config)]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", CODE_BOOKS)
def test_what_is_decoded_is_encoded_to_the_same_codes(quant_type: str, double_quant: bool) -> None:
    config = settings(quant_type=quant_type, double_quant=double_quant)
    recoding_changes_nothing(gaussian(256, 512), Recode(config))
    broken(recoding_changes_nothing, gaussian(256, 512), Recode(config, noise=0.1))


@pytest.mark.parametrize("quant_type", CODE_BOOKS)
def test_zeros_stay_zeros(quant_type: str) -> None:
    weight = torch.zeros(64, 128)
    weight[0, :64] = gaussian(64)
    decoded = bnb_4bit.decode(bnb_4bit.encode(weight, settings(quant_type=quant_type, double_quant=False)))
    assert not decoded[1:].any() and not decoded[0, 64:].any() and decoded[0, :64].any()


def test_the_same_weight_is_stored_in_the_same_bytes() -> None:
    stored = [bnb_4bit.linear(bnb_4bit.encode(gaussian(128, 128, seed=s), settings()), None) for s in (0, 0, 1)]
    first, again, other = (images(layer.named_parameters()) for layer in stored)
    assert first == again != other


# --- sizes and errors -----------------------------------------------------------------------------------------------------------------


def bits_are_as_computed(layer: nn.Module, folder: Path, config: bnb_4bit.Config) -> None:
    """A saved layer's bytes, over its weights, are the formula's bits within half a percent."""
    from safetensors.torch import save_file

    file = folder / "layer.safetensors"
    save_file({key: value.contiguous() for key, value in layer.state_dict().items()}, file)
    weights = layer.in_features * layer.out_features  # type: ignore[operator]
    assert 8 * file.stat().st_size / weights == pytest.approx(bnb_4bit.weight_bits(config, 32), rel=5e-3)


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.127), (False, 4.5)])
def test_bits_per_weight_of_a_saved_layer_are_the_formulas(double_quant: bool, bits: float, tmp_path: Path) -> None:
    config = settings(double_quant=double_quant)
    assert bnb_4bit.weight_bits(config, 32) == pytest.approx(bits, abs=5e-4)
    layer = bnb_4bit.linear(bnb_4bit.encode(gaussian(2048, 1024), config), None)
    bits_are_as_computed(layer, tmp_path, config)
    broken(bits_are_as_computed, layer, tmp_path, settings(double_quant=not double_quant))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_stored_bytes_of_a_parameter_are_the_formulas_to_the_byte(block: int, double_quant: bool) -> None:
    config = settings(block_size=block, double_quant=double_quant)
    layer = bnb_4bit.linear(bnb_4bit.encode(gaussian(512, 256 * block // 64), config), None)
    parameter: Any = layer.weight
    assert 8 * stored_bytes(parameter) == bnb_4bit.weight_bits(config, 32) * 512 * 256 * block // 64
    assert stored_bytes(parameter) > parameter.numel() * parameter.element_size()  # the scales are counted


@pytest.mark.parametrize("name", MINIATURES)
def test_a_built_models_bytes_are_those_of_its_parts(name: str) -> None:
    plain = load(spec_of(name), None)
    weights = sum(layer.weight.numel() for layer in linear_layers(plain).values())
    rest = sum(parameter.numel() for parameter in plain.parameters()) - weights
    assert make(spec_of(name)).base_bytes == 4 * (weights + rest)
    blocks = [layer.weight.numel() // 64 for layer in linear_layers(plain).values()]
    scales = sum(each + 4 * -(-each // 256) for each in blocks)
    assert make(spec_of(name, "lora_r8", "nf4")).base_bytes == 4 * rest + weights // 2 + scales


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_tells_its_bits(name: str) -> None:
    choice = catalogue.quantizer(name, "bfloat16")
    bits = choice.module("quantizers").weight_bits(choice.config, 16)
    assert bits == 16 if choice.kind == "none" else 0 < bits < 16


def relative_error(config: bnb_4bit.Config) -> float:
    weight = gaussian(1024, 1024)
    return float((bnb_4bit.decode(bnb_4bit.encode(weight, config)) - weight).norm() / weight.norm())


def test_nf4s_error_on_gaussian_weights_is_that_of_the_reference_and_smaller_than_fp4s() -> None:
    assert relative_error(settings(double_quant=False)) == pytest.approx(0.092, abs=5e-4)
    assert relative_error(settings()) == pytest.approx(0.092, abs=1e-3)
    assert relative_error(settings(quant_type="fp4")) > 1.2 * relative_error(settings())
    errors = [relative_error(settings(block_size=block)) for block in BLOCKS]
    assert all(finer < coarser for finer, coarser in pairwise(errors))


def test_nf4s_codes_carry_the_entropy_of_the_reference() -> None:
    found = codes(bnb_4bit.encode(gaussian(1024, 1024), settings())).reshape(-1, 64)
    counts = np.stack([(found == code).sum(1) for code in range(16)], axis=1) / 64
    entropy = -(counts * np.log2(counts, where=counts > 0, out=np.zeros_like(counts))).sum(1).mean()
    assert entropy == pytest.approx(3.6875, abs=0.005)


# --- the layer ------------------------------------------------------------------------------------------------------------------------


def layer_multiplies_what_the_codes_stand_for(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """y = W x + b and grad x = W^T grad y with W decoded; nothing else has a gradient."""
    inputs = gaussian(5, layer.in_features, seed=1).requires_grad_()
    upstream = gaussian(5, layer.out_features, seed=2)
    out = layer(inputs)
    out.backward(upstream)
    assert_close(out, inputs @ weight.T + (0 if bias is None else bias))
    assert_close(inputs.grad, upstream @ weight)
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("quant_type", CODE_BOOKS)
def test_a_layer_multiplies_with_what_its_codes_stand_for_and_sends_gradients_through(
    quant_type: str, with_bias: bool
) -> None:
    weight, bias = gaussian(96, 128), gaussian(96) if with_bias else None
    stored = bnb_4bit.encode(weight, settings(quant_type=quant_type))
    layer = bnb_4bit.linear(stored, bias)
    layer_multiplies_what_the_codes_stand_for(layer, bnb_4bit.decode(stored), bias)
    broken(layer_multiplies_what_the_codes_stand_for, layer, weight, bias)  # not the weight before rounding
    broken(layer_multiplies_what_the_codes_stand_for, nn.Linear(128, 96, bias=with_bias), weight, bias)


def test_the_storage_dtype_changes_no_result() -> None:
    weight, inputs = gaussian(96, 128), gaussian(5, 128, seed=1)
    layers = [bnb_4bit.linear(bnb_4bit.encode(weight, settings(quant_storage=s)), None) for s in ("uint8", "bfloat16")]
    assert [layer.weight.dtype for layer in layers] == [torch.uint8, torch.bfloat16]
    assert torch.equal(layers[0](inputs), layers[1](inputs))
    assert stored_bytes(layers[0].weight) == stored_bytes(layers[1].weight)


def test_a_saved_layer_is_read_back_byte_by_byte(tmp_path: Path) -> None:
    import bitsandbytes
    from safetensors.torch import load_file, save_file

    layer: Any = bnb_4bit.linear(bnb_4bit.encode(gaussian(96, 128), settings()), None).eval()
    inputs = gaussian(5, 128, seed=1)
    before = layer(inputs)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    saved = load_file(tmp_path / "layer.safetensors")
    again = copy.deepcopy(layer)
    again.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        saved.pop("weight"), {key.removeprefix("weight."): value for key, value in saved.items()}, device="cpu"
    )
    assert torch.equal(again(inputs), before)
    assert images(again.named_parameters()) == images(layer.named_parameters())
    assert {key: value.tolist() for key, value in again.state_dict().items()} == {
        key: value.tolist() for key, value in layer.state_dict().items()
    }


# --- the model ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MINIATURES)
@pytest.mark.parametrize("quant_type", CODE_BOOKS)
def test_every_linear_layer_of_the_blocks_is_replaced_and_nothing_else(name: str, quant_type: str) -> None:
    import bitsandbytes

    plain, quantized = (load(spec_of(name), None) for _ in range(2))
    quantize(quantized, Choice(name="x", kind="bnb_4bit", config=settings(quant_type=quant_type)))
    replaced = linear_layers(quantized)
    assert replaced.keys() == linear_layers(plain).keys()
    for each, layer in linear_layers(plain).items():
        new = quantized.get_submodule(each)
        assert isinstance(new, bitsandbytes.nn.Linear4bit)
        weight = layer.weight.T if hasattr(layer, "nx") else layer.weight  # Conv1D stores (in, out)
        assert (new.out_features, new.in_features) == tuple(new.weight.quant_state.shape) == tuple(weight.shape)
        decoded = bnb_4bit.decode(bnb_4bit.Stored(new.weight.data, new.weight.quant_state, settings()))
        assert_close(decoded, weight, 0.2)
        old_bias, new_bias = getattr(layer, "bias", None), new.bias
        assert (old_bias is None) == (new_bias is None) and (old_bias is None or torch.equal(old_bias, new_bias))
    rest = {n: p for n, p in plain.named_parameters() if n.rpartition(".")[0] not in replaced}
    assert images(rest.items()).items() <= images(quantized.named_parameters()).items()


def close_logits(one: nn.Module, two: nn.Module, least: float) -> None:
    """The logits correlate by more than `least`."""
    ids = random_examples(0, count=1, longest=40)[0].ids * 2
    with torch.no_grad():
        pair = torch.stack([all_logits(model, ids).flatten() for model in (one, two)])
    assert torch.corrcoef(pair)[0, 1] > least


@pytest.mark.parametrize("name", MINIATURES)
def test_a_quantized_models_logits_are_close_to_the_originals(name: str) -> None:
    gentle = spec_of(dataclasses.replace(catalogue.model(name)))  # as it is initialised
    plain, quantized, transposed = (load(gentle, None) for _ in range(3))
    quantize(quantized, catalogue.quantizer("nf4", "float32"))
    least = 0.99 if gentle.model.family == "gpt2" else 0.98
    close_logits(quantized, plain, least)
    with torch.no_grad():
        for layer in linear_layers(transposed).values():  # a mutant that takes the other orientation for the weight's
            layer.weight.copy_(layer.weight.T.clone().reshape(layer.weight.shape))
    broken(close_logits, transposed, plain, least)


def passes_leave_bits_and_numbers_alone(model: nn.Module) -> None:
    """Training mode and evaluation mode give the same bits, and an evaluation pass changes no stored byte."""
    examples = random_examples(3)
    ids = examples[0].ids * 2
    before = images([*model.named_parameters(), *model.named_buffers()])
    results = []
    for mode in (True, False, True):
        model.train(mode)
        with torch.inference_mode():
            results.append(all_logits(model, ids))
        text_log_likelihoods(model, examples, 64)
    assert images([*model.named_parameters(), *model.named_buffers()]) == before
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def nf4_models(name: str) -> list[nn.Module]:
    """The quantized base and a trained adapter on it."""
    return [stirred(name, "lora_r8", "nf4").unload(), stirred(name, "lora_r8", "nf4")]  # type: ignore[operator]


@pytest.mark.parametrize("name", MINIATURES)
def test_training_and_evaluation_mode_agree_bitwise_and_evaluation_changes_no_weight(name: str) -> None:
    for model in nf4_models(name):
        layers: list[Any] = [
            m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "compute_dtype")
        ]
        assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
        passes_leave_bits_and_numbers_alone(model)


@pytest.mark.parametrize("name", MINIATURES)
def test_repacking_for_the_cpu_would_change_weights_and_numbers(name: str) -> None:
    """The mutant: bitsandbytes' own default on CPUs with AVX512-BF16 (traps 2 and 3 of reference/stack.md)."""
    from bitsandbytes.nn import modules

    if not modules.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16: bitsandbytes does not repack here")
    half = dataclasses.replace(spec_of(name).model, dtype="bfloat16")
    model: Any = make(spec_of(half, "lora_r8", "nf4")).model.unload()
    passes_leave_bits_and_numbers_alone(model)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = True
    broken(passes_leave_bits_and_numbers_alone, model)
