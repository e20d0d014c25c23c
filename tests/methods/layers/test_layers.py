"""Layers. The law: isolated attention is attention under a block-diagonal mask, the supervised
loss is Transformers' own, and the linear layers of the blocks are those that the closed forms
count."""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from fixtures.model import (
    MINIATURES,
    answer_log_likelihood,
    assert_close,
    broken,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stirred,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from finrepro.catalogue import reader
from finrepro.data.batches import COLLATE, Batch
from finrepro.data.tokens import IGNORE
from finrepro.evaluation.log_likelihood import text_log_likelihoods
from finrepro.evidence.result import header
from finrepro.methods.layers import isolated_attention as ours
from finrepro.methods.layers.linear import is_conv1d, linear_layers
from finrepro.methods.layers.supervised import SupervisedLM, backbone_and_head
from finrepro.models.build import configuration
from finrepro.running.seal import attention_used

MODELS = tuple(
    name for name in reader.entries("models") if reader.model(name).low_rank is None
)  # test_low_rank.py has the others
HEADS = ((4, 4), (4, 2), (8, 1))  # multi-head, grouped-query, one key-value head


class Attention(nn.Module):
    """What Transformers hands to an attention function: the layer, for its flags."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.is_causal = True
        self.num_key_value_groups = groups


def block_diagonal(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float | None
) -> Tensor:
    """Attention by its definition: softmax over the scores that a block-diagonal causal mask
    leaves, in double precision.
    """
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (segment[:, None] == segment) & torch.ones(
        len(segment), len(segment), dtype=torch.bool
    ).tril()
    scores = (
        query
        @ key.transpose(-1, -2)
        * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    )
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def attention_is_block_diagonal(
    attend: Any, heads: tuple[int, int], lengths: tuple[int, ...], scaling: float | None
) -> None:
    """Output and the gradients of query, key and value are those of the definition."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tensors = [
        torch.randn(1, h, sum(lengths), 16, generator=generator) * 2
        for h in (heads[0], heads[1], heads[1])
    ]
    weight = torch.randn(1, sum(lengths), heads[0], 16, generator=generator)
    results = []
    for compute in (
        lambda q, k, v: attend(
            Attention(heads[0] // heads[1]), q, k, v, None, scaling=scaling, segment_lengths=lengths
        )[0],
        lambda q, k, v: block_diagonal(q, k, v, lengths, scaling),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = compute(*leaves)
        (out * weight).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert_close(
            found, expected, floor=float(out.detach().norm())
        )  # a single token has no gradient to its query


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [(5,), (1, 1, 1), (7, 1, 20, 3), (16, 16)])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_isolated_attention_equals_attention_under_a_block_diagonal_mask(
    heads: tuple[int, int], lengths: tuple[int, ...], scaling: float | None
) -> None:
    attention_is_block_diagonal(ours.isolated_attention, heads, lengths, scaling)


def without_segments(*arguments: Any, segment_lengths: tuple[int, ...], **options: Any) -> Any:
    return ours.isolated_attention(*arguments, **options)


def without_scaling(*arguments: Any, scaling: float, **options: Any) -> Any:
    return ours.isolated_attention(*arguments, **options)


def not_causal(
    _: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    *,
    scaling: Any,
    segment_lengths: Any,
) -> Any:
    parts = zip(*(tensor.split(segment_lengths, 2) for tensor in (query, key, value)), strict=True)
    rows = [
        scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True) for q, k, v in parts
    ]
    return torch.cat(rows, 2).transpose(1, 2), None


def heads_in_turn(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
) -> Any:
    times = query.shape[1] // key.shape[1]
    return ours.isolated_attention(
        module, query, key.repeat(1, times, 1, 1), value.repeat(1, times, 1, 1), mask, **options
    )


@pytest.mark.parametrize("mutant", [without_segments, without_scaling, not_causal, heads_in_turn])
def test_attention_that_leaks_or_scales_or_groups_otherwise_is_found(mutant: Any) -> None:
    broken(attention_is_block_diagonal, mutant, (4, 2), (7, 1, 20, 3), 0.7)


def test_without_segments_isolated_attention_is_causal_attention_over_each_row() -> None:
    query, key, value = (torch.randn(3, heads, 12, 16) for heads in (4, 2, 2))
    (found, _) = ours.isolated_attention(Attention(2), query, key, value, None)
    for row in range(3):
        assert_close(
            found[row],
            block_diagonal(query[row, None], key[row, None], value[row, None], (12,), None)[0],
        )


CALLED = {
    "sdpa": "sdpa_attention_forward",
    "sdpa per segment": "scaled_dot_product_attention",
    "flash varlen": "_variable_length",
}


def what_is_recorded_is_what_is_called(
    monkeypatch: pytest.MonkeyPatch, layout: Any, recorded: Any
) -> None:
    """A cell trained in this layout and scored; every call of attention is spied on."""
    seen: list[str] = []
    for said, name in CALLED.items():
        whole = getattr(ours, name)
        monkeypatch.setattr(
            ours, name, lambda *a, said=said, whole=whole, **k: seen.append(said) or whole(*a, **k)
        )
    spec = spec_of("llama3_1_8b_mini", "lora_r8", layout=layout)
    model, examples = make(spec).model, random_examples(0)
    SupervisedLM(model)(COLLATE[layout](examples)).backward()
    found = {"train": set(seen)}
    seen.clear()
    text_log_likelihoods(model, examples, max_tokens=64)
    found["evaluate"] = set(seen)
    assert found == {phase: {each} for phase, each in recorded(spec)["cell"]["attention"].items()}


def recorded_header(spec: Any) -> Any:
    return {"cell": {"attention": attention_used(spec, "cpu")}}


@pytest.mark.parametrize("layout", list(COLLATE))
def test_the_recorded_implementation_is_the_one_that_computes(
    layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    what_is_recorded_is_what_is_called(monkeypatch, layout, recorded_header)
    padded = {
        "cell": {
            "attention": {
                "train": "sdpa per segment" if layout == "padded" else "sdpa",
                "evaluate": "sdpa",
            }
        }
    }
    broken(what_is_recorded_is_what_is_called, monkeypatch, layout, lambda _: padded)


def test_the_recorded_implementation_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention, which no CPU computes, is called where the function says so: on CUDA in
    16 bits.
    """
    query, key, value = torch.randn(3, 1, 4, 12, 16)
    called: list[int] = []
    monkeypatch.setattr(
        ours, "_variable_length", lambda q, *_: called.append(1) or q.transpose(1, 2)
    )
    says = ours.implementation
    for device, dtype in itertools.product(
        ("cpu", "cuda"), (torch.float32, torch.bfloat16, torch.float16)
    ):
        monkeypatch.setattr(
            ours, "implementation", lambda some, *_, it=(device, dtype): says(some, *it)
        )
        for segments in (None, (5, 7)):
            called.clear()
            ours.isolated_attention(Attention(1), query, key, value, None, segment_lengths=segments)
            assert bool(called) == (
                device == "cuda" and dtype != torch.float32 and segments is not None
            )


def test_what_was_not_computed_has_no_implementation() -> None:
    spec = spec_of("gpt2_127m_mini", "lora_r8", max_steps=0)
    assert attention_used(spec, "cpu") == {"train": None, "evaluate": "sdpa"}
    assert header(spec, "failed", "a reason", 0.0)["cell"]["attention"] is None


def test_segments_in_a_batch_of_several_rows_are_refused() -> None:
    query, key, value = torch.randn(3, 2, 4, 12, 16)
    with pytest.raises(ValueError, match="one row"):
        ours.isolated_attention(Attention(1), query, key, value, None, segment_lengths=(6, 6))


def test_segments_that_do_not_fill_the_row_are_refused() -> None:
    query, key, value = torch.randn(3, 1, 4, 12, 16)
    with pytest.raises(RuntimeError, match="split"):
        ours.isolated_attention(Attention(1), query, key, value, None, segment_lengths=(6, 5))


def loss_is_transformers_own(module: Any, model: nn.Module, batch: Batch) -> None:
    """The sum of the negative log-likelihood is Transformers' mean loss with labels, times their
    number.
    """
    labels = torch.full(batch.input_ids.shape, IGNORE)
    rows, columns = batch.positions // labels.shape[1], batch.positions % labels.shape[1]
    labels[rows, columns + 1] = (
        batch.targets
    )  # Transformers shifts: a label stands at its own token
    theirs = model(input_ids=batch.input_ids, labels=labels, use_cache=False).loss * len(
        batch.targets
    )
    assert_close(module(batch), theirs)


class Mean(nn.Module):
    """A mutant: the mean over the batch instead of the sum."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = SupervisedLM(model)

    def forward(self, batch: Batch) -> Tensor:
        return self.inner(batch) / len(batch.targets)


@pytest.mark.parametrize("name", MINIATURES)
@pytest.mark.parametrize(
    ("adapter", "quantizer"), [("full", "none"), ("lora_r8", "none"), ("lora_r8", "nf4")]
)
def test_the_supervised_loss_is_transformers_own(name: str, adapter: str, quantizer: str) -> None:
    model, batch = stirred(name, adapter, quantizer), COLLATE["padded"](random_examples(0))
    loss_is_transformers_own(SupervisedLM(model), model, batch)
    broken(loss_is_transformers_own, Mean(model), model, batch)


@pytest.mark.parametrize("name", MINIATURES)
@pytest.mark.parametrize("layout", tuple(COLLATE))
def test_the_supervised_loss_is_the_sum_of_the_answers_log_likelihoods(
    name: str, layout: str
) -> None:
    model, examples = stirred(name), random_examples(1)
    expected = -torch.stack([answer_log_likelihood(model, example) for example in examples]).sum()
    assert_close(SupervisedLM(model)(COLLATE[layout](examples)), expected)


@pytest.mark.parametrize("name", MINIATURES)
def test_backbone_and_head_are_the_same_modules_under_peft(name: str) -> None:
    built = make(spec_of(name, "lora_r8")).model
    inner = built.get_base_model()
    assert backbone_and_head(built) == (getattr(inner, inner.base_model_prefix), inner.lm_head)


@cache
def on_meta(name: str) -> Any:
    """A catalogue model of its real size, without storage."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(configuration(reader.model(name)))


@pytest.mark.parametrize("name", MODELS)
def test_the_catalogues_parameters_are_those_of_the_architecture(name: str) -> None:
    assert (
        sum(parameter.numel() for parameter in on_meta(name).parameters())
        == reader.model(name).parameters
    )


def shapes(layers: dict[str, nn.Module]) -> list[tuple[int, int]]:
    """(in, out) of each layer, whichever way its weight lies."""
    return [
        tuple(w.weight.shape) if is_conv1d(w) else tuple(w.weight.shape[::-1])
        for w in layers.values()
    ]  # type: ignore[union-attr, misc]


# Adapted modules, linear weights, LoRA parameters per unit of rank
CLOSED_FORMS = {
    "gpt2_127m": (48, 12 * 12 * 768**2, 147_456),
    "gpt2_1_5b": (192, 48 * 12 * 1600**2, 1_228_800),
    "llama2_7b": (224, 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2_498_560),
    "llama2_13b": (280, 40 * (4 * 5120**2 + 3 * 5120 * 13824), 3_911_680),
    "llama3_1_8b": (224, 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 2_621_440),
    "llama3_1_70b": (560, 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672), 12_943_360),
}
REAL = tuple(
    name for name in MODELS if (model := reader.model(name)).hub and model.variant == "base"
)


def linear_layers_are_counted(name: str, layers: dict[str, nn.Module]) -> None:
    """Number, weights and in + out are the closed forms."""
    sizes = shapes(layers)
    found = (len(sizes), sum(i * o for i, o in sizes), sum(i + o for i, o in sizes))
    assert found == CLOSED_FORMS[name]


def test_every_real_model_has_a_closed_form_and_the_first_two_are_there() -> None:
    assert {"gpt2_127m", "llama3_1_8b"} <= set(REAL) <= set(CLOSED_FORMS)


@pytest.mark.parametrize("name", REAL)
def test_the_linear_layers_are_those_of_the_closed_forms(name: str) -> None:
    model = on_meta(name)
    layers = linear_layers(model)
    linear_layers_are_counted(name, layers)
    broken(linear_layers_are_counted, name, {**layers, "lm_head": model.lm_head})
    broken(linear_layers_are_counted, name, dict(list(layers.items())[1:]))
    assert all(is_conv1d(layer) for layer in layers.values()) == name.startswith("gpt2")


@pytest.mark.parametrize("name", MINIATURES)
@pytest.mark.parametrize("quantizer", ["none", "nf4"])
def test_the_linear_layers_are_found_whatever_class_holds_them(name: str, quantizer: str) -> None:
    model = make(spec_of(name, "lora_r8", quantizer)).model.unload()
    per_block = {"gpt2": 4, "llama": 7}[reader.model(name).family]
    blocks = model.config.num_hidden_layers
    names = list(linear_layers(model))
    assert len(names) == per_block * blocks
    assert not any("head" in each or "embed" in each or "wte" in each for each in names)
