"""Building a model. The law: load, quantize, adapt, freeze in this order; the catalogue says
what the model is, the checkpoint gives the weights, all of them and from safetensors alone;
whatever is random hangs on the cell's seed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model import (
    CPU,
    MINIATURES,
    all_logits,
    broken,
    images,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    texts,
)
from safetensors.torch import load_file, save_file
from torch import nn

from finrepro.catalogue import reader
from finrepro.catalogue.spec import RunSpec
from finrepro.data.tokens import train_tokenizer
from finrepro.errors import EnvironmentFault
from finrepro.kinds import adapter_of
from finrepro.methods.layers import isolated_attention
from finrepro.methods.layers.linear import linear_layers
from finrepro.models.build import build, load, load_tokenizer, quantize

IDS = random_examples(0, count=1, longest=40)[0].ids
everywhere = pytest.mark.parametrize("name", MINIATURES)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a checkpoint of a miniature, as the hub would hold it, with the seed 7."""

    def write(name: str, **options: Any) -> Path:
        load(spec_of(name, seed=7), None).save_pretrained(tmp_path / name, **options)
        return tmp_path / name

    return write


def only_the_base_is_quantized(model: nn.Module) -> None:
    """The layers of the blocks are 4-bit, and the adapter beside them is not."""
    base = {n: m for n, m in model.named_modules() if n.endswith(".base_layer")}
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert base and all(module.weight.dtype == torch.uint8 for module in base.values())
    assert factors and all(p.requires_grad and p.dtype == torch.float32 for p in factors.values())
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in factors)


@everywhere
def test_a_model_is_quantized_before_it_is_adapted_and_frozen_before_it_is_trained(
    name: str,
) -> None:
    spec = spec_of(name, "lora_r8", "nf4")
    only_the_base_is_quantized(make(spec).model)
    mutant = adapter_of(spec.adapter).apply(load(spec, None), spec.seed)
    quantize(mutant, spec.quantizer)  # adapted first: the adapter's own layers are linear too
    broken(only_the_base_is_quantized, mutant)
    thawed = make(spec).model
    thawed.get_input_embeddings().requires_grad_(True)
    broken(only_the_base_is_quantized, thawed)


@everywhere
@pytest.mark.parametrize(
    ("adapter", "quantizer"), [("full", "none"), ("lora_r8", "none"), ("lora_r8", "nf4")]
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_built_model_is_in_training_mode_without_dropout_or_cache(
    name: str, adapter: str, quantizer: str, loaded: bool, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name) if loaded else None
    assert load(spec_of(name), folder).training
    built = make(spec_of(name, adapter, quantizer), folder)
    assert all(module.training for module in built.model.modules())
    assert not any(isinstance(module, nn.Dropout) and module.p for module in built.model.modules())
    assert not built.model.config.use_cache
    assert built.model.config._attn_implementation == isolated_attention.NAME
    assert torch.equal(all_logits(built.model, IDS), all_logits(built.model.eval(), IDS))


@everywhere
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_parameters_are_counted_before_quantization_as_the_catalogue_says(
    name: str, quantizer: str
) -> None:
    whole = reader.model(name)
    built = build(spec_of(whole, "lora_r8", quantizer), None, CPU)
    assert built.base_parameters == whole.parameters


@everywhere
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_the_dtype_is_the_catalogues_and_not_the_checkpoints(
    name: str, stored: str, wanted: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    saved = load_file(folder / "model.safetensors")
    as_stored = {key: value.to(getattr(torch, stored)) for key, value in saved.items()}
    save_file(as_stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": stored}))
    model = dataclasses.replace(spec_of(name).model, dtype=wanted)
    for place in (folder, None):
        assert {p.dtype for p in load(spec_of(model), place).parameters()} == {
            getattr(torch, wanted)
        }


def tensors_of(model: nn.Module) -> dict[str, str]:
    return images(model.state_dict().items())


@everywhere
def test_a_checkpoints_weights_are_taken_as_they_are(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    wanted = tensors_of(load(spec_of(name, seed=7), None))
    for options in ({}, {"max_shard_size": "100KB"}):
        folder = checkpoint(name, **options)
        assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(options)
        assert tensors_of(load(spec_of(name, seed=0), folder)) == wanted
        assert tensors_of(make(spec_of(name, seed=0), folder).model) == wanted
        for path in folder.iterdir():
            path.unlink()


@everywhere
def test_random_weights_hang_on_the_seed_alone(name: str) -> None:
    state = torch.get_rng_state()
    first = tensors_of(load(spec_of(name), None))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert tensors_of(load(spec_of(name), None)) == first
    other = tensors_of(load(spec_of(name, seed=1), None))
    assert sum(first[key] != other[key] for key in first) >= len(
        linear_layers(load(spec_of(name), None))
    )


@everywhere
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_input_and_output_embeddings_are_tied_as_in_the_architecture(
    name: str, quantizer: str, checkpoint: Callable[[str], Path]
) -> None:
    spec = spec_of(name, "lora_r8", quantizer)
    tied = spec.model.family == "gpt2"
    for folder in (None, checkpoint(name)):
        model = make(spec, folder).model.get_base_model()
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied


def remake(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    saved = load_file(folder / "model.safetensors")
    change(saved)
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def garbled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a tensor file")


def emptied(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def absent(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def one_missing(folder: Path) -> None:
    remake(
        folder, lambda saved: saved.pop(next(key for key in saved if key.endswith("_proj.weight")))
    )


def one_too_many(folder: Path) -> None:
    remake(folder, lambda saved: saved.update({"extra.weight": torch.ones(3)}))


def another_size(folder: Path) -> None:
    key = "norm.weight", "ln_f.weight"
    remake(
        folder,
        lambda saved: saved.update({next(k for k in saved if k.endswith(key)): torch.ones(3)}),
    )


FAULTS = (
    only_pickles,
    truncated,
    garbled,
    emptied,
    absent,
    one_missing,
    one_too_many,
    another_size,
)


def refused_in_one_line(spec: RunSpec, folder: Path) -> None:
    """`load` raises `EnvironmentFault` with one line that names the folder."""
    try:
        load(spec, folder)
    except EnvironmentFault as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return
    raise AssertionError("a broken checkpoint was loaded")


@everywhere
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_refused_in_one_line(
    name: str, fault: Callable[[Path], None], checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    broken(refused_in_one_line, spec_of(name), folder)
    fault(folder)
    refused_in_one_line(spec_of(name), folder)


@everywhere
def test_a_truncated_or_lost_shard_is_refused_in_one_line(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(name, max_shard_size="100KB")
    last = max(folder.glob("model-*.safetensors"))
    content = last.read_bytes()
    last.write_bytes(content[:-10])
    refused_in_one_line(spec_of(name), folder)
    last.unlink()
    refused_in_one_line(spec_of(name), folder)
    last.write_bytes(content)
    broken(refused_in_one_line, spec_of(name), folder)


@everywhere
def test_a_checkpoint_of_another_architecture_is_refused_and_its_dropout_is_not_taken_over(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    """GPT-2's own configuration on the hub asks for dropout 0.1; what a run did must stand in
    its spec.
    """
    folder = checkpoint(name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            config
            | {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}
        )
    )
    model = load(spec_of(name), folder).train()
    assert torch.equal(all_logits(model, IDS), all_logits(model, IDS))
    deeper = spec_of(name).model
    key = "n_layer" if "n_layer" in deeper.architecture else "num_hidden_layers"
    for layers in (1, 3):
        other = dataclasses.replace(deeper, architecture={**deeper.architecture, key: layers})
        refused_in_one_line(spec_of(other), folder)


@everywhere
def test_a_loaded_model_knows_its_name_and_not_its_folder(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    for place in (folder, None):
        model = load(spec_of(name), place)
        assert model.name_or_path == model.config._name_or_path == name


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    for content in (None, "{"):
        if content:
            (tmp_path / "tokenizer.json").write_text(content)
            (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(EnvironmentFault, match="cannot load the tokenizer") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ends", [False, True])
def test_a_tokenizer_that_appends_its_end_token_is_named(ends: bool, tmp_path: Path) -> None:
    from tokenizers import processors

    ours = train_tokenizer(texts(), "llama", 400)
    if ends:
        special = [(token, ours.convert_tokens_to_ids(token)) for token in (BEGIN, END)]
        ours.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {END}", special_tokens=special
        )
    ours.save_pretrained(tmp_path)
    if not ends:
        assert load_tokenizer(tmp_path)("a")["input_ids"][-1] != ours.eos_token_id
        return
    with pytest.raises(EnvironmentFault, match=r"appends .* to every text.*add_eos_token=False"):
        load_tokenizer(tmp_path)


BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
