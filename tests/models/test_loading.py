"""Loading. The law: a checkpoint that plain Transformers wrote gives the numbers that
`from_pretrained` gives, bit by bit, whatever its names, shards and ties; the same holds when it
is quantized on the way; no more than one part is ever there in full precision."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model import CPU, all_logits, broken, images, process, random_examples, spec_of, tiny  # noqa: F401
from fixtures.process import PROGRAMS, on_ranks
from safetensors.torch import load_file, save_file
from torch import nn

from finrepro.catalogue import reader
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import EnvironmentFault
from finrepro.methods.layers.linear import linear_layers
from finrepro.models import loading
from finrepro.models.build import build, configuration, load, quantize, skeleton, source

IDS = random_examples(0, count=1, longest=40)[0].ids
GPT2, LLAMA = "gpt2_127m_mini", "llama3_1_8b_mini"


def spec(
    name: str, quantizer: str = "none", adapter: str = "lora_r8", **architecture: Any
) -> RunSpec:
    base = tiny(name)
    return spec_of(
        dataclasses.replace(base, architecture={**base.architecture, **architecture}),
        adapter,
        quantizer,
    )


def plain(of: RunSpec, folder: Path, seed: int = 11, **options: Any) -> Path:
    """A checkpoint that Transformers writes, without a line of this project but the
    configuration.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(configuration(of.model)).save_pretrained(folder, **options)
    return folder


def rename(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2's own file: no prefix, and the causal masks among the weights."""
    named = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    for layer in range(2):
        named[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        named[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return named


def with_old_frequencies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Old Llama files keep each layer's rotary frequencies; wrong ones here: they must not be
    taken.
    """
    return tensors | {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for layer in range(2)
    }


def head_alone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of two tied tensors the other one."""
    return {
        "lm_head.weight" if key == "transformer.wte.weight" else key: value
        for key, value in tensors.items()
    }


def both_tied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


CASES: dict[str, tuple[RunSpec, dict[str, Any], Any]] = {
    "llama in shards": (spec(LLAMA), {"max_shard_size": "100KB"}, None),
    "llama tied": (spec(LLAMA, tie_word_embeddings=True), {}, None),
    "llama with old frequencies": (spec(LLAMA), {}, with_old_frequencies),
    "gpt2 with prefix": (spec(GPT2), {}, None),
    "gpt2 as on the hub": (spec(GPT2), {}, as_on_the_hub),
    "gpt2 with the head's name": (spec(GPT2), {}, head_alone),
    "gpt2 with both names": (spec(GPT2), {}, both_tied),
    "gpt2 untied, in shards": (
        spec(GPT2, tie_word_embeddings=False),
        {"max_shard_size": "100KB"},
        None,
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


def written(case: str, folder: Path) -> tuple[RunSpec, Path, nn.Module]:
    """A case's spec, its folder, and what `from_pretrained` reads from it."""
    from transformers import AutoModelForCausalLM

    of, options, change = CASES[case]
    plain(of, folder, **options)
    if change is not None:
        rename(folder, change)
    return (
        of,
        folder,
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ),
    )


def same_bits(actual: nn.Module, expected: nn.Module) -> None:
    """Every stored tensor, and every logit of a sequence."""
    assert images(actual.state_dict().items()) == images(expected.state_dict().items())
    actual.train()
    expected.train()
    assert torch.equal(all_logits(actual, IDS), all_logits(expected, IDS))


@each_case
def test_a_plain_checkpoint_gives_the_bits_that_transformers_reads(
    case: str, tmp_path: Path
) -> None:
    of, folder, reference = written(case, tmp_path)
    found = load(of, folder)
    same_bits(found, reference)
    tied = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert tied is bool(configuration(of.model).tie_word_embeddings)
    with torch.no_grad():
        next(found.parameters())[0, 0] += 1e-3
    broken(same_bits, found, reference)


@pytest.mark.parametrize("quantizer", ["nf4", "int8"])
@pytest.mark.parametrize("case", ["llama in shards", "gpt2 as on the hub"])
def test_what_is_quantized_on_the_way_is_what_is_quantized_afterwards(
    case: str, quantizer: str, tmp_path: Path
) -> None:
    of, folder, reference = written(case, tmp_path)
    if quantizer not in reader.entries("quantizers"):
        pytest.skip(f"no quantizer {quantizer}")
    choice = reader.quantizer(quantizer, of.model.dtype)
    quantize(reference, choice)
    reference.requires_grad_(False)
    found = skeleton(of)
    loading.stream(found, source(of, found, folder), choice, CPU)
    same_bits(found.requires_grad_(False), reference)


@pytest.mark.parametrize("name", [GPT2, LLAMA])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_are_the_familys_own_initialisation(name: str, dtype: str) -> None:
    """Part by part, and yet the bits that Transformers draws for a whole model without storage,
    under the same seed.
    """
    from transformers import AutoModelForCausalLM

    base = dataclasses.replace(tiny(name), dtype=dtype)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(
            configuration(base), dtype=getattr(torch, dtype)
        )
    reference.to_empty(device="cpu")
    for module in reference.modules():
        module._is_hf_initialized = False
    torch.manual_seed(5)
    reference.initialize_weights()
    reference.tie_weights()
    same_bits(load(spec_of(base, seed=5), None), reference)
    broken(same_bits, load(spec_of(base, seed=6), None), reference)


class Watch:
    """Looks at the model each time that a part is finished."""

    def __init__(self, model: Any, quantized: bool) -> None:
        self.model, self.quantized, self.seen = model, quantized, 0

    def __call__(self, part: nn.Module) -> None:
        self.seen += 1
        ahead = False
        for _, other in loading.in_order(self.model):
            parameters = list(other.parameters())
            assert all(parameter.is_meta for parameter in parameters) or not ahead, (
                "a later part is there already"
            )
            if not ahead and self.quantized:
                dense = [m for m in other.modules() if type(m).__name__ in ("Linear", "Conv1D")]
                assert other is self.model.get_output_embeddings() or not dense, (
                    "a linear layer is left in full precision"
                )
            ahead = ahead or other is part
        assert ahead


def one_part_at_a_time(name: str, folder: Path | None, quantizer: str) -> None:
    of = spec(name)
    model = skeleton(of)
    watch = Watch(model, quantized=True)
    loading.stream(
        model, source(of, model, folder), reader.quantizer(quantizer, "float32"), CPU, watch
    )
    assert watch.seen == (
        6 if name == GPT2 else 5
    )  # embeddings (two in GPT-2), two blocks, the norm, the head


@pytest.mark.parametrize("name", [GPT2, LLAMA])
@pytest.mark.parametrize("drawn", [False, True])
def test_one_part_is_there_in_full_precision_at_a_time(
    name: str, drawn: bool, tmp_path: Path
) -> None:
    folder = None if drawn else plain(spec(name), tmp_path, max_shard_size="100KB")
    one_part_at_a_time(name, folder, "nf4")
    broken(one_part_at_a_time, name, folder, "none")


@pytest.mark.parametrize("name", [GPT2, LLAMA])
def test_base_bytes_are_what_lies_in_memory(name: str) -> None:
    """Every tensor that the built base holds, its scales among them, without the code books that
    all layers share.
    """
    for quantizer in reader.entries("quantizers"):
        of = spec(name, quantizer)
        model = skeleton(of)
        total = loading.stream(model, source(of, model, None), of.quantizer, CPU)
        parameters = sum(each.numel() * each.element_size() for each in model.parameters())
        assert build(of, None, CPU).base_bytes == total
        assert (
            total == parameters if quantizer == "none" else parameters <= total < 1.2 * parameters
        )


def refused(of: RunSpec, folder: Path, *parts: str) -> None:
    """Loading raises one line with all the parts."""
    try:
        load(of, folder)
    except EnvironmentFault as error:
        assert "\n" not in str(error) and str(folder) in str(error), error
        for part in parts:
            assert part in str(error), error
        return
    raise AssertionError("it was loaded")


def changed(**tensors: Any) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda saved: {
        **saved,
        **{key.replace("__", "."): value for key, value in tensors.items()},
    }


FAULTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "missing": (
        lambda saved: {k: v for k, v in saved.items() if k != "model.layers.1.mlp.up_proj.weight"},
        ("has no tensor model.layers.1.mlp.up_proj.weight",),
    ),
    "unexpected": (
        changed(extra__weight=torch.ones(3)),
        ("unexpected tensor extra.weight of shape [3]",),
    ),
    "shape": (
        changed(model__norm__weight=torch.ones(3)),
        ("the shape of model.norm.weight is [3]", "[64]"),
    ),
    "dtype": (
        changed(model__norm__weight=torch.ones(64, dtype=torch.int8)),
        ("the dtype of model.norm.weight is 'I8'",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_tensor_is_named_with_what_it_is_and_what_it_should_be(
    fault: str, tmp_path: Path
) -> None:
    of, (change, parts) = spec(LLAMA), FAULTS[fault]
    plain(of, tmp_path)
    broken(refused, of, tmp_path)
    refused(of, rename(tmp_path, change), "is not llama3_1_8b_mini", *parts)


@pytest.mark.parametrize(
    ("number", "dtype"), [(math.nan, "float32"), (-math.inf, "bfloat16"), (1e300, "bfloat16")]
)
def test_a_weight_that_is_no_number_is_refused_by_name(
    number: float, dtype: str, tmp_path: Path
) -> None:
    """Also one that is finite in the file and too large for the model's dtype."""
    of = spec(LLAMA)
    plain(of, tmp_path)
    of = dataclasses.replace(of, model=dataclasses.replace(of.model, dtype=dtype))
    load(of, tmp_path)
    norm = torch.ones(64, dtype=torch.float64)
    norm[7] = number
    rename(tmp_path, changed(model__norm__weight=norm))
    refused(of, tmp_path, f"model.norm.weight holds NaN or an infinity as torch.{dtype}")


def test_tied_tensors_of_two_values_are_refused(tmp_path: Path) -> None:
    of = spec(GPT2)
    plain(of, tmp_path)
    rename(
        tmp_path,
        lambda saved: both_tied(saved) | {"lm_head.weight": saved["transformer.wte.weight"] + 1},
    )
    refused(of, tmp_path, "transformer.wte.weight and lm_head.weight differ")


def test_another_configuration_is_named_by_its_key_and_both_values(tmp_path: Path) -> None:
    of = spec(LLAMA)
    plain(of, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, said in (
        ("hidden_act", "gelu", "hidden_act is 'gelu', llama3_1_8b_mini has 'silu'"),
        ("num_attention_heads", 8, "num_attention_heads is 8"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 500000.0},
            "rope_parameters.factor is None",
        ),
        ("model_type", "gpt2", "model_type is 'gpt2', llama3_1_8b_mini has 'llama'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        refused(of, tmp_path, said)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert linear_layers(load(of, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantizer", "other"),
    [("none", ()), ("nf4", ()), ("nf4", ("lora_r8", "gpt2_127m_mini_lr_r64"))],
)
def test_at_stage_3_two_ranks_load_half_each_and_train_as_at_stage_0(
    quantizer: str, other: tuple[str, ...], tmp_path: Path
) -> None:
    on_ranks(PROGRAMS / "two_ranks_loading.py", quantizer, tmp_path, *other)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank in found:
        whole, split = rank["0"], rank["3"]
        assert (
            split["losses"] == pytest.approx(whole["losses"], rel=1e-5)
            and len(whole["losses"]) == 3
        )
        assert whole["losses"][0] != whole["losses"][-1]
        assert split["held"] <= 0.51 * whole["held"], (split, whole)
        assert all(
            split[key] == whole[key]
            for key in ("base_bytes", "base_parameters", "trainable_parameters")
        )
