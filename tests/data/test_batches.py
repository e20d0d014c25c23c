"""Micro-batches. The law: whatever the layout, loss and every gradient are those of one example
at a time, every supervised token is there, and nothing but the supervised positions goes through
the output head."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from fixtures.model import (
    MINIATURES,
    VOCABULARY,
    Watch,
    all_logits,
    answer_log_likelihood,
    assert_close,
    assert_same_gradients,
    broken,
    gradients,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
    stirred,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from finrepro.data import batches, packing
from finrepro.data.batches import COLLATE, Batch, end_to_end, side_by_side
from finrepro.data.tokens import IGNORE, Encoded
from finrepro.evaluation.log_likelihood import choice_log_likelihoods, text_log_likelihoods
from finrepro.methods.layers.supervised import SupervisedLM, backbone_and_head
from finrepro.models.build import configuration

LAYOUTS = tuple(COLLATE)
METHODS = (
    ("full", "none"),
    ("lora_r8", "none"),
    ("lora_r8", "nf4"),
    ("houlsby_m64", "nf4"),
)
everywhere = pytest.mark.parametrize("name", MINIATURES)
with_every_method = pytest.mark.parametrize(("adapter", "quantizer"), METHODS)


def micro_batches(examples: Sequence[Encoded], layout: str, max_tokens: int = 64) -> list[Batch]:
    """The examples in several micro-batches, as a training step lays them out."""
    lengths = [len(example.ids) for example in examples]
    parts = packing.LAYOUTS[layout](list(range(len(examples))), lengths, max_tokens)
    return [COLLATE[layout]([examples[row] for row in part]) for part in parts]


def together(model: nn.Module, parts: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss and gradients over micro-batches."""
    losses = []
    for batch in parts:
        loss = SupervisedLM(model)(batch)
        loss.backward()
        losses.append(loss.detach().double())
    return torch.stack(losses).sum(), gradients(model)


def one_by_one(model: nn.Module, examples: Sequence[Encoded]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from the definition: each example alone, through the whole model and head."""
    losses = []
    for example in examples:
        loss = -answer_log_likelihood(model, example)
        loss.backward()
        losses.append(loss.detach().double())
    return torch.stack(losses).sum(), gradients(model)


def layout_is_exact(model: nn.Module, examples: Sequence[Encoded], parts: Sequence[Batch]) -> None:
    """Loss and all gradients are those of one example at a time."""
    loss, slopes = together(model, parts)
    expected_loss, expected_slopes = one_by_one(model, examples)
    assert_close(loss, expected_loss)
    assert_same_gradients(slopes, expected_slopes)


def every_supervised_token_is_kept(examples: Sequence[Encoded], parts: Sequence[Batch]) -> None:
    """The multiset of (token read, token to predict) is that of the examples, and so are the
    real tokens.
    """
    expected = Counter(
        (example.ids[t - 1], example.ids[t])
        for example in examples
        for t in range(example.answer_start, len(example.ids))
    )
    actual: Counter[tuple[int, int]] = Counter()
    for batch in parts:
        read = batch.input_ids.flatten()[batch.positions].tolist()
        actual.update(zip(read, batch.targets.tolist(), strict=True))
    assert actual == expected
    assert sum(expected.values()) == sum(example.num_supervised for example in examples)


def test_every_layout_can_be_planned_and_made_and_both_are_there() -> None:
    assert set(COLLATE) == set(packing.LAYOUTS) >= {"padded", "bins"}
    assert {name.split("_")[0] for name in MINIATURES} >= {"gpt2", "llama3"}


@everywhere
@with_every_method
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_all_gradients_equal_one_by_one(
    name: str, adapter: str, quantizer: str, layout: str, seed: int
) -> None:
    examples = random_examples(seed, count=7 + seed)
    parts = micro_batches(examples, layout)
    assert len(parts) > 1 and max(len(part.targets) for part in parts) > 1
    layout_is_exact(stirred(name, adapter, quantizer), examples, parts)


def seeing_one_another(batch: Batch) -> Batch:
    return dataclasses.replace(batch, segment_lengths=None)


def counted_by_twos(batch: Batch) -> Batch:
    return dataclasses.replace(batch, position_ids=batch.position_ids * 2)


def cut_elsewhere(batch: Batch) -> Batch:
    first, second, *rest = batch.segment_lengths or ()
    return dataclasses.replace(batch, segment_lengths=(first + 1, second - 1, *rest))


def one_late(batch: Batch) -> Batch:
    return dataclasses.replace(batch, positions=(batch.positions + 1) % batch.input_ids.numel())


def one_lost(batch: Batch) -> Batch:
    return dataclasses.replace(batch, positions=batch.positions[:-1], targets=batch.targets[:-1])


@everywhere
@pytest.mark.parametrize(
    "mutant", [seeing_one_another, counted_by_twos, cut_elsewhere, one_late, one_lost]
)
def test_a_bin_that_leaks_miscounts_or_loses_a_token_is_found(name: str, mutant: object) -> None:
    examples = random_examples(0, count=5)
    layout_is_exact(stirred(name), examples, [end_to_end(examples)])
    broken(layout_is_exact, stirred(name), examples, [mutant(end_to_end(examples))])  # type: ignore[operator]


def padded_on_the_left(examples: Sequence[Encoded], pad_id: int = 0) -> Batch:
    """A mutant of `side_by_side`: causal attention sees the padding."""
    longest = max(len(example.ids) for example in examples)
    rows = [[*[pad_id] * (longest - len(example.ids)), *example.ids] for example in examples]
    targets = [
        [*[IGNORE] * (longest - len(example.ids)), *example.targets()] for example in examples
    ]
    return batches._finish(rows, targets, torch.arange(longest)[None], None)


def pad_value_does_not_matter(
    model: nn.Module, collate: object, examples: Sequence[Encoded]
) -> None:
    """Bit by bit the same loss and gradients, whatever stands in the padding."""
    results = [together(model, [collate(examples, pad_id)]) for pad_id in (0, 7, VOCABULARY - 1)]  # type: ignore[operator]
    for loss, slopes in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(slopes[name], results[0][1][name]) for name in slopes)


@everywhere
def test_the_value_of_the_padding_cannot_matter(name: str) -> None:
    examples = random_examples(3)
    assert len({len(example.ids) for example in examples}) > 1
    pad_value_does_not_matter(stirred(name), side_by_side, examples)
    broken(pad_value_does_not_matter, stirred(name), padded_on_the_left, examples)
    broken(layout_is_exact, stirred(name), examples, [padded_on_the_left(examples)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(5))
def test_every_supervised_token_is_kept(layout: str, seed: int) -> None:
    examples = random_examples(seed, count=30)
    parts = micro_batches(examples, layout)
    every_supervised_token_is_kept(examples, parts)
    broken(every_supervised_token_is_kept, examples, parts[:-1])
    broken(every_supervised_token_is_kept, examples, [*parts[:-1], one_lost(parts[-1])])
    broken(every_supervised_token_is_kept, examples, [*parts[:-1], one_late(parts[-1])])


def test_an_example_longer_than_a_micro_batch_is_neither_cut_nor_dropped() -> None:
    examples = [*random_examples(0, count=4, longest=10), Encoded(tuple(range(50)), 3)]
    for layout in LAYOUTS:
        parts = micro_batches(examples, layout, max_tokens=16)
        every_supervised_token_is_kept(examples, parts)
        assert any(batch.input_ids.shape == (1, 50) for batch in parts)


@everywhere
@with_every_method
def test_an_empty_batch_has_no_loss_and_a_whole_graph(
    name: str, adapter: str, quantizer: str
) -> None:
    model = stirred(name, adapter, quantizer)
    loss = SupervisedLM(model)(batches.empty())
    loss.backward()
    assert loss.item() == 0.0
    slopes = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert slopes and all(grad is not None and not grad.any() for grad in slopes.values())
    broken(layout_is_exact, model, random_examples(1), [batches.empty()])


@everywhere
def test_transformers_own_packing_leaks_with_a_cache_and_ours_does_not(name: str) -> None:
    """Position ids isolate packed sequences only while no key-value cache is in use."""
    examples = random_examples(5, count=3)
    batch = end_to_end(examples)
    spec = spec_of(name)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(
        configuration(spec.model), attn_implementation="sdpa"
    ).eval()
    alone = torch.cat([all_logits(reference, example.ids) for example in examples])
    packed = {
        cache: reference(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=cache
        ).logits[0]
        for cache in (False, True)
    }
    assert_close(packed[False], alone)
    assert (packed[True] - alone).abs().max() > 0.01, "fixed upstream: drop this half of the test"

    ours = make(spec).model.eval()
    ours.load_state_dict(reference.state_dict())
    backbone, head = backbone_and_head(ours)
    for cache in (False, True):
        hidden = backbone(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=cache,
            segment_lengths=batch.segment_lengths,
        )
        assert_close(head(hidden.last_hidden_state)[0], alone)
    for mode in (True, False):
        ours.config.use_cache = mode  # what the loop computes does not hang on the configuration
        layout_is_exact(ours.train(), examples, [batch])


def head_sees(model: nn.Module, expected: int, compute: object) -> None:
    """Exactly `expected` rows go through the output head."""
    _, head = backbone_and_head(model)
    with Watch(head) as watch:
        compute()  # type: ignore[operator]
    assert sum(watch.rows) == expected


@everywhere
@with_every_method
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_supervised_positions_go_through_the_head_in_training(
    name: str, adapter: str, quantizer: str, layout: str
) -> None:
    model, examples = stirred(name, adapter, quantizer), random_examples(2)
    parts = micro_batches(examples, layout)
    supervised = sum(example.num_supervised for example in examples)
    assert supervised < sum(len(example.ids) for example in examples)
    head_sees(model, supervised, lambda: together(model, parts))
    broken(
        head_sees, model, supervised, lambda: one_by_one(model, examples)
    )  # the plain forward pass computes every row


@everywhere
@with_every_method
def test_only_needed_positions_go_through_the_head_in_scoring(
    name: str, adapter: str, quantizer: str
) -> None:
    model = stirred(name, adapter, quantizer).eval()
    examples = random_examples(2)
    supervised = sum(example.num_supervised for example in examples)
    head_sees(model, supervised, lambda: text_log_likelihoods(model, examples, 64))
    items = [
        [
            Encoded((*prompt.ids, *answer), len(prompt.ids))
            for answer in ((5, 6), (5, 7), (8, 9, 10), (11,))
        ]
        for prompt in examples
    ]
    expected_bytes = len(items) * (
        1 + 1 + 1 + 2
    )  # the prompt's last token for all choices, then each answer's but its last
    head_sees(model, expected_bytes, lambda: choice_log_likelihoods(model, items, 256))
    head_sees(model, expected_bytes, lambda: choice_log_likelihoods(model, items, 16))
    broken(
        head_sees,
        model,
        supervised,
        lambda: [all_logits(model, example.ids) for example in examples],
    )


@everywhere
@with_every_method
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activation_checkpointing_gives_the_same_gradients(
    name: str, adapter: str, quantizer: str, layout: str
) -> None:
    parts = micro_batches(random_examples(4), layout)
    results, passes = [], []
    for checkpointing in (False, True):
        model = stir(
            make(spec_of(name, adapter, quantizer, activation_checkpointing=checkpointing)).model
        )
        backbone, _ = backbone_and_head(model)
        block = backbone.h[0] if hasattr(backbone, "h") else backbone.layers[0]
        attention = block.attn if hasattr(block, "attn") else block.self_attn
        calls: list[int] = []
        attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results.append(together(model, parts))
        passes.append(len(calls))
    assert passes == [len(parts), 2 * len(parts)], (
        "checkpointing computes each block's forward twice"
    )
    assert_close(results[1][0], results[0][0], 1e-6)
    assert_same_gradients(results[1][1], results[0][1], 1e-6)
