"""Scoring. The law: a choice's log-likelihood is what one plain forward pass over its prompt and
answer gives, however much of the computation is shared, however many rows stand in a batch, on
whichever model."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import (
    MINIATURES,
    VOCABULARY,
    Watch,
    all_logits,
    answer_log_likelihood,
    assert_close,
    broken,
    process,  # noqa: F401
    random_examples,
    stirred,
    with_every_method,
)
from torch import Tensor, nn

from finrepro.data.batches import side_by_side
from finrepro.data.tokens import Encoded
from finrepro.evaluation import log_likelihood
from finrepro.evaluation.log_likelihood import (
    SHORTEST_PREFIX,
    choice_log_likelihoods,
    text_log_likelihoods,
)
from finrepro.methods.layers.supervised import SupervisedLM, backbone_and_head

everywhere = pytest.mark.parametrize("name", MINIATURES)
Items = list[list[Encoded]]

ONE_TOKEN = ((5,), (6,), (7,))
SEVERAL_TOKENS = (
    (5, 9, 11),
    (5, 9),
    (6, 8, 5, 3),
    (4,),
)  # one the beginning of another, and different lengths


def items_of(
    prefix: int, answers: Sequence[tuple[int, ...]], count: int = 7, seed: int = 1
) -> Items:
    """Prompts of random lengths after a shared instruction of `prefix` tokens, each with every
    answer.
    """
    generator = np.random.default_rng(seed)
    instruction = generator.integers(0, VOCABULARY, size=prefix).tolist()
    rests = [
        generator.integers(0, VOCABULARY, size=n).tolist()
        for n in generator.integers(1, 25, size=count)
    ]
    for row, rest in enumerate(rests):
        rest[0] = row  # so that exactly the instruction is shared
    prompts = [(*instruction, *rest) for rest in rests]
    return [[Encoded((*prompt, *answer), len(prompt)) for answer in answers] for prompt in prompts]


@torch.no_grad()
def one_by_one(model: nn.Module, items: Items) -> Tensor:
    return torch.stack(
        [
            torch.stack([answer_log_likelihood(model, choice) for choice in choices])
            for choices in items
        ]
    )


def scores_are_those_of_one_by_one(
    model: nn.Module, items: Items, max_tokens: int = 96, expected: Tensor | None = None
) -> None:
    """Each value within 1e-5 of its size, hence the same label. `expected` are the items' scores
    one by one, where they are at hand.
    """
    found = torch.tensor(choice_log_likelihoods(model, items, max_tokens))
    expected = one_by_one(model, items) if expected is None else expected
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= 1e-5 * expected.abs()).all(), (found - expected).abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@everywhere
@with_every_method
@pytest.mark.parametrize("prefix", [0, SHORTEST_PREFIX - 1, 20])
@pytest.mark.parametrize(
    "answers", [ONE_TOKEN, SEVERAL_TOKENS], ids=["one_token", "several_tokens"]
)
def test_choices_score_as_in_full_passes_one_by_one(
    name: str, adapter: str, quantizer: str, prefix: int, answers: tuple[tuple[int, ...], ...]
) -> None:
    model = stirred(name, adapter, quantizer).eval()
    items = items_of(prefix, answers)
    expected = one_by_one(model, items)
    scores_are_those_of_one_by_one(model, items, expected=expected)
    assert answers is SEVERAL_TOKENS or len(set(expected.argmax(-1).tolist())) > 1  # labels differ
    broken(scores_are_those_of_one_by_one, shifted(model), items, expected=expected)


class _Shifted(nn.Module):
    """A mutant head: the logits of the next token id."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.weight = head, head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        return (
            logits.roll(1, -1) if hidden.ndim == 2 else logits
        )  # only where we pick the positions ourselves


def shifted(model: nn.Module) -> nn.Module:
    import copy

    mutant: Any = copy.deepcopy(model)
    inner = mutant.get_base_model() if hasattr(mutant, "get_base_model") else mutant
    inner.lm_head = _Shifted(inner.lm_head)
    return mutant


@everywhere
@pytest.mark.parametrize("prefix", [0, 20])
def test_the_size_of_a_batch_changes_no_label_and_no_score(name: str, prefix: int) -> None:
    model, items = (
        stirred(name, "lora_r8", "nf4").eval(),
        items_of(prefix, SEVERAL_TOKENS, count=12, seed=3),
    )
    found = [
        torch.tensor(choice_log_likelihoods(model, items, size)) for size in (1, 40, 100, 10**6)
    ]
    for other in found[1:]:
        assert_close(other, found[0])
        assert torch.equal(other.argmax(-1), found[0].argmax(-1))


@everywhere
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("length", [1, SHORTEST_PREFIX, SHORTEST_PREFIX + 1, 30])
def test_equal_prompts_and_single_items_score_as_one_by_one(
    name: str, count: int, length: int
) -> None:
    ids = random_examples(1, count=20, longest=60)[0].ids * 40
    items = [[Encoded((*ids[:length], *answer), length) for answer in SEVERAL_TOKENS]] * count
    scores_are_those_of_one_by_one(stirred(name).eval(), items)


def test_nothing_to_score_gives_nothing() -> None:
    assert choice_log_likelihoods(stirred(MINIATURES[0]), [], 64) == []
    assert text_log_likelihoods(stirred(MINIATURES[0]), [], 64) == []


def test_items_may_differ_in_the_number_of_their_choices() -> None:
    model, items = stirred(MINIATURES[0]).eval(), items_of(10, SEVERAL_TOKENS)
    ragged = [choices[: 1 + row % 4] for row, choices in enumerate(items)]
    found = choice_log_likelihoods(model, ragged, 64)
    for values, choices in zip(found, ragged, strict=True):
        assert_close(torch.tensor(values), one_by_one(model, [choices])[0])


def test_the_prompts_of_an_item_must_agree() -> None:
    items = items_of(0, ONE_TOKEN)
    items[2][1] = Encoded(
        (*items[2][1].ids[:-2], 99, *items[2][1].ids[-1:]), items[2][1].answer_start
    )
    with pytest.raises(ValueError, match="share their prompt"):
        choice_log_likelihoods(stirred(MINIATURES[0]), items, 64)


# --- planted mutants


def branches_see_each_other(layout: Sequence[Any], width: int, prefix: int) -> Tensor:
    """Plain causal attention: a later answer sees the earlier ones."""
    seen = torch.ones(len(layout), width, prefix, dtype=torch.bool)
    causal = torch.ones(width, width, dtype=torch.bool).tril().expand(len(layout), -1, -1)
    return torch.cat([seen, causal], dim=-1)[:, None]


def prefix_is_hidden(layout: Sequence[Any], width: int, prefix: int) -> Tensor:
    """The branches do not see the shared beginning."""
    mask = ORIGINAL_MASK(layout, width, prefix).clone()
    mask[..., :prefix] = False
    return mask


def counted_through(rest: tuple[int, ...], answers: Sequence[tuple[int, ...]], offset: int) -> Any:
    """Positions that run on from one answer into the next."""
    row = ORIGINAL_BRANCHES(rest, answers, offset)
    row.depth = list(range(offset, offset + len(row.ids)))
    return row


def counted_from_zero(
    rest: tuple[int, ...], answers: Sequence[tuple[int, ...]], offset: int
) -> Any:
    """Positions that forget the shared beginning."""
    return ORIGINAL_BRANCHES(rest, answers, 0)


def one_token_too_many(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """A shared beginning that is not shared."""
    found = ORIGINAL_PREFIX(prompts)
    return prompts[0][: len(found) + 1] if found else ()


ORIGINAL_MASK, ORIGINAL_BRANCHES, ORIGINAL_PREFIX = (
    log_likelihood._mask,
    log_likelihood._branches,
    log_likelihood._shared_prefix,
)
MUTANTS: list[tuple[str, Callable[..., Any]]] = [
    ("_mask", branches_see_each_other),
    ("_mask", prefix_is_hidden),
    ("_branches", counted_through),
    ("_branches", counted_from_zero),
    ("_shared_prefix", one_token_too_many),
]


@everywhere
@pytest.mark.parametrize(
    ("part", "mutant"), MUTANTS, ids=[mutant.__name__ for _, mutant in MUTANTS]
)
def test_a_mask_position_or_prefix_that_is_wrong_is_found(
    name: str, part: str, mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, items = stirred(name).eval(), items_of(20, SEVERAL_TOKENS)
    monkeypatch.setattr(log_likelihood, part, mutant)
    broken(scores_are_those_of_one_by_one, model, items)


# --- what is shared


@pytest.mark.parametrize("prefix", [0, SHORTEST_PREFIX - 1, SHORTEST_PREFIX, 20])
@pytest.mark.parametrize("seed", range(4))
def test_the_shared_prefix_is_what_all_prompts_begin_with_and_leaves_each_a_token(
    prefix: int, seed: int
) -> None:
    prompts = [
        choices[0].ids[: choices[0].answer_start]
        for choices in items_of(prefix, ONE_TOKEN, seed=seed)
    ]
    shared = log_likelihood._shared_prefix(prompts)
    assert shared == (prompts[0][:prefix] if prefix >= SHORTEST_PREFIX else ())
    cut = (
        [*prompts, prompts[0][:prefix]] if prefix else prompts
    )  # a prompt that is the shared beginning itself
    left = min(prefix, min(map(len, cut)) - 1)
    assert log_likelihood._shared_prefix(cut) == (cut[0][:left] if left >= SHORTEST_PREFIX else ())


@everywhere
@with_every_method
def test_a_shared_instruction_is_computed_once_for_the_whole_set(
    name: str, adapter: str, quantizer: str
) -> None:
    model = stirred(name, adapter, quantizer).eval()
    items = items_of(20, SEVERAL_TOKENS)
    backbone, _ = backbone_and_head(model)
    with Watch(backbone.get_input_embeddings()) as watch:
        choice_log_likelihoods(model, items, 1)  # a row a pass: no padding
    answers = sum(len(answer) - 1 for answer in SEVERAL_TOKENS)
    rests = [choices[0].answer_start - 20 + answers for choices in items]
    assert sorted(watch.rows) == sorted([20, *rests])


@everywhere
@with_every_method
@pytest.mark.parametrize("max_tokens", [1, 64, 10**6])
def test_a_texts_log_likelihood_is_minus_its_loss(
    name: str, adapter: str, quantizer: str, max_tokens: int
) -> None:
    model = stirred(name, adapter, quantizer).eval()
    texts = [Encoded(example.ids, 1) for example in random_examples(4)] + random_examples(5)
    found = torch.tensor(text_log_likelihoods(model, texts, max_tokens))
    with torch.no_grad():
        losses = torch.stack([SupervisedLM(model)(side_by_side([text])) for text in texts])
        plain = torch.stack([answer_log_likelihood(model, text) for text in texts])
    assert_close(found, -losses)
    assert_close(found, plain)
    with pytest.raises(AssertionError):
        assert_close(found.roll(1), plain)


@everywhere
def test_progress_counts_every_row_once(name: str) -> None:
    model, items = stirred(name).eval(), items_of(0, ONE_TOKEN)
    seen: list[tuple[int, int]] = []
    choice_log_likelihoods(model, items, 32, lambda done, total: seen.append((done, total)))
    assert len(seen) > 1 and seen[-1] == (len(items), len(items)) and sorted(seen) == seen
    seen.clear()
    text_log_likelihoods(
        model, random_examples(0), 32, lambda done, total: seen.append((done, total))
    )
    assert len(seen) > 1 and seen[-1] == (9, 9) and sorted(seen) == seen


@everywhere
def test_scoring_leaves_no_trace_in_the_model(name: str) -> None:
    model, items = stirred(name, "lora_r8", "nf4").eval(), items_of(20, SEVERAL_TOKENS)
    before = all_logits(model, range(20))
    choice_log_likelihoods(model, items, 64)
    after = all_logits(model, range(20))
    assert torch.equal(before, after)
    assert after.requires_grad and all(parameter.grad is None for parameter in model.parameters())
