"""Models small enough to compute with in milliseconds, made from the catalogue's miniatures, and the plain computations that the tests
hold the project's own against: one example at a time, every logit, no cache, no packing."""

import copy
import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finrepro import PROJECT
from finrepro.catalogue import reader
from finrepro.catalogue.spec import Evaluation, Model, RunSpec, Train, label_of
from finrepro.data import files
from finrepro.data.examples import Example
from finrepro.data.tokens import Encoded, train_tokenizer
from finrepro.models.build import Built, build
from finrepro.runtime import process as runtime
from finrepro.settings import Choice

CPU = torch.device("cpu")
VOCABULARY = 512
# Of the models that a hub has; those that are trained from scratch have laws of their own.
ALL_MINIATURES = tuple(
    name
    for name in reader.catalogue("models")
    if (original := reader.model(name).miniature_of) and reader.model(original).hub
)
MINIATURES = (
    "gpt2_127m_mini",
    "llama3_1_8b_mini",
)  # one a family: Conv1D layers, and grouped queries (out differs from in)
# A parameter `name` over every miniature, those that only repeat a family under --slow.
every_miniature = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in MINIATURES else pytest.mark.slow) for name in ALL_MINIATURES]
)
# Parameters `adapter` and `quantizer`: a full model, LoRA plain and on rounded weights, and the adapters that are layers of our own.
with_every_method = pytest.mark.parametrize(
    ("adapter", "quantizer"),
    [("full", "none"), ("lora_r8", "none"), ("lora_r8", "nf4"), ("iec_r8", "nf4"), ("houlsby_m64", "nf4")],
)
ADAPTERS = tuple(reader.catalogue("adapters"))
QUANTIZERS = tuple(reader.catalogue("quantizers"))
# Weights far from zero, so that attention is sharp and a wrong mask or position moves every number.
SMALLER: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY, "initializer_range": 0.2},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY, "initializer_range": 0.2},
}


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """The process as a cell finds it: seeded, two threads, deterministic. Imported by the test files that compute."""
    runtime.quiet_environment()
    runtime.setup(0, 2)
    yield
    torch.use_deterministic_algorithms(False)


def tiny(name: str) -> Model:
    """A miniature of the catalogue, smaller still."""
    model = reader.model(name)
    smaller = dict(SMALLER[model.family])
    if "hidden_size" in smaller and smaller["hidden_size"] % model.architecture["num_attention_heads"]:
        del smaller["hidden_size"]  # six heads do not divide it: the miniature's own width
    return dataclasses.replace(model, architecture={**model.architecture, **smaller})


def train_settings(**changes: Any) -> Train:
    """The smoke scale's training settings of table 3, changed."""
    grid = reader.table("3").smoke
    return reader.train_settings({**grid.train, **changes}, "test.train")


def spec_of(
    model: str | Model,
    adapter: str | Choice = "full",
    quantizer: str | Choice = "none",
    seed: int = 0,
    **train: Any,
) -> RunSpec:
    """A cell on a tiny model with random weights."""
    base = tiny(model) if isinstance(model, str) else model
    train_on, scored = reader.train_set("tfns", "short")
    weights = reader.quantizer(quantizer, base.dtype) if isinstance(quantizer, str) else quantizer
    method = reader.adapter(adapter) if isinstance(adapter, str) else adapter
    return RunSpec(
        label=label_of((base.name, weights.name, method.name, train_on.name), None, seed),
        model=base,
        weights="random",
        base_checkpoint=None,
        base_run=None,
        quantizer=weights,
        adapter=method,
        train_on=train_on,
        tasks=scored,
        train=train_settings(**train),
        evaluation=EVALUATION,
        seed=seed,
        threads=2,
        world_size=1,
    )


EVALUATION = Evaluation(split="development", max_tokens=1024, resamples=200, confidence=0.95, seed=0)


def texts() -> list[str]:
    """Some of the embedded text."""
    splits = files.load(reader.dataset("tfns"), None).splits
    return [example.text for example in splits["train"][:1500]]


@cache
def tokenizer(family: str) -> Any:
    """A tokenizer of the family with as many tokens as a tiny model has."""
    return train_tokenizer(texts(), family, VOCABULARY)


def make(spec: RunSpec, folder: Path | None = None) -> Built:
    """The cell's model, as a run builds it."""
    return build(spec, folder, CPU)


def stir(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move every trainable parameter away from where it began, in place: an adapter that does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise, alpha=0.05)
    return model


@cache
def _stirred(name: str, adapter: str, quantizer: str) -> nn.Module:
    return stir(make(spec_of(name, adapter, quantizer)).model)


def stirred(name: str, adapter: str = "full", quantizer: str = "none") -> nn.Module:
    """A tiny model whose adapter is not at its beginning any more; a copy, to be changed at will."""
    return copy.deepcopy(_stirred(name, adapter, quantizer))


def random_examples(seed: int, count: int = 9, longest: int = 40, answers: tuple[int, int] = (1, 5)) -> list[Encoded]:
    """Examples of random tokens, lengths and answers, the shortest of two tokens."""
    generator = np.random.default_rng(seed)
    found = []
    for length in generator.integers(2, longest + 1, size=count).tolist():
        answer = int(min(generator.integers(*answers), length - 1))
        ids = tuple(generator.integers(0, VOCABULARY, size=length).tolist())
        found.append(Encoded(ids, length - answer))
    return found


def real_examples(count: int) -> list[Example]:
    """Examples of TFNS's development split, spread over it."""
    split = files.load(reader.dataset("tfns"), None).splits["development"]
    return list(split[:: len(split) // count][:count])


def all_logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Every logit of one sequence, by the model's own plain forward pass."""
    device = next(model.parameters()).device
    return model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()


def answer_log_likelihood(model: nn.Module, example: Encoded) -> Tensor:
    """Summed log-probability of the answer, straight from the definition: token t from the logits at t - 1."""
    logprobs = all_logits(model, example.ids).log_softmax(-1)
    return torch.stack([logprobs[t - 1, example.ids[t]] for t in range(example.answer_start, len(example.ids))]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of each trainable parameter's gradient, zero where there is none; the model's own are dropped."""
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return found


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5, floor: float = 0.0, what: str = "") -> None:
    """The distance is at most `tolerance` of the expected tensor's length, or of `floor`."""
    distance = float(torch.linalg.vector_norm((actual - expected).detach().double()))
    scale = max(float(torch.linalg.vector_norm(expected.detach().double())), floor)
    assert distance <= tolerance * scale, f"{what}: off by {distance:.3g} at a length of {scale:.3g}"


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Each gradient equals the expected one; one that is nearly zero is measured against all of them."""
    assert actual.keys() == expected.keys()
    whole = float(torch.stack([torch.linalg.vector_norm(each) for each in expected.values()]).norm())
    assert whole > 0
    for name, value in expected.items():
        assert_close(actual[name], value, tolerance, 1e-3 * whole, name)


def images(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The sha256 of named tensors as they lie in memory, quantized ones with their scales: for comparing bit by bit."""
    found = {}
    for name, tensor in tensors:
        content = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        found[name] = hashlib.sha256(content).hexdigest()
        scales, state = getattr(tensor, "SCB", None), getattr(tensor, "quant_state", None)  # of 8 bits, of 4
        if scales is not None:
            found |= images([(f"{name}.SCB", scales)])
        if state is not None:
            found |= images((f"{name}.{key}", value) for key, value in state.as_dict(packed=True).items())
    return found


def positions(tensor: Tensor) -> int:
    """How many positions a tensor of token ids or of hidden states holds."""
    return tensor.shape[:-1].numel() if tensor.is_floating_point() else tensor.numel()


class Watch:
    """Counts what goes into a module: `rows` is the number of positions of each call."""

    def __init__(self, module: nn.Module) -> None:
        self.rows: list[int] = []
        self._handle = module.register_forward_pre_hook(lambda _, arguments: self.rows.append(positions(arguments[0])))

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def broken(law: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """The law does not hold for what is given: a planted mutant is found."""
    with pytest.raises(AssertionError):
        law(*arguments, **options)


def in_processes(code: str, arguments: Sequence[Sequence[str]], hash_seeds: Sequence[str]) -> list[str]:
    """What `code` prints in fresh processes, one a hash seed, run side by side."""
    assert len(set(hash_seeds)) > 1
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *given],
            cwd=PROJECT,
            env=os.environ
            | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for given, seed in zip(arguments, hash_seeds, strict=True)
    ]
    printed = []
    for each in started:
        out, error = each.communicate(timeout=300)
        assert each.returncode == 0, error
        printed.append(out)
    return printed
