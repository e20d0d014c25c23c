"""Generation. The law: a row's tokens are those of picking the likeliest next token one at a
time from full passes over that row alone, whatever stands beside it in a batch, and a row that
has ended costs nothing more."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fixtures.model import (
    MINIATURES,
    Watch,
    all_logits,
    broken,
    process,  # noqa: F401
    random_examples,
    stirred,
    with_every_method,
)
from torch import nn

from finrepro.evaluation import generation
from finrepro.evaluation.generation import Tokens, generate
from finrepro.methods.layers.supervised import backbone_and_head

everywhere = pytest.mark.parametrize("name", MINIATURES)
NEW = 8
LIMITS = (NEW,) * 9
NEVER = -1  # an end-of-text token that no model can give


def prompts(count: int = 9) -> list[Tokens]:
    """Prompts of very different lengths, the shortest of one token."""
    return [(7,), *(example.ids for example in random_examples(11, count=count - 1, longest=60))]


@torch.no_grad()
def one_by_one(
    model: nn.Module, given: Sequence[Tokens], limits: Sequence[int], end: int
) -> list[Tokens]:
    """The definition: a full pass over the row alone for each token, no cache."""
    found = []
    for prompt, limit in zip(given, limits, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + limit:
            token = int(all_logits(model, ids)[-1].argmax())
            if token == end:
                break
            ids.append(token)
        found.append(tuple(ids[len(prompt) :]))
    return found


def often(rows: Sequence[Tokens]) -> int:
    """A token that ends some rows early, at different places, when it is taken for the end of
    the text.
    """
    places = {
        token: {row.index(token) for row in rows if token in row} for token in set().union(*rows)
    }
    return max(places, key=lambda token: (len(places[token]), token))


def cut(row: Tokens, limit: int, end: int) -> Tokens:
    """What of a row that nothing has ended is its beginning by the definition: each token
    depends on those before it alone.
    """
    row = row[:limit]
    return row[: row.index(end)] if end in row else row


def tokens_are_those_of_one_by_one(
    model: nn.Module,
    end: int,
    max_tokens: int = 10**6,
    limits: Sequence[int] = LIMITS,
    whole: Sequence[Tokens] | None = None,
) -> None:
    """Every row equals the definition's, of which `whole` holds the rows that nothing has ended."""
    whole = one_by_one(model, prompts(), LIMITS, NEVER) if whole is None else whole
    expected = [cut(row, limit, end) for row, limit in zip(whole, limits, strict=True)]
    assert generate(model, prompts(), limits, [end], max_tokens) == expected


@everywhere
@with_every_method
def test_tokens_are_those_of_full_passes_one_by_one(
    name: str, adapter: str, quantizer: str
) -> None:
    model = stirred(name, adapter, quantizer).eval()
    whole = one_by_one(model, prompts(), LIMITS, NEVER)
    assert len(set(whole)) > len(whole) // 2, "rows that all say the same prove nothing"
    end = often(whole)
    ended = one_by_one(model, prompts(), LIMITS, end)
    assert len({len(row) for row in ended}) > 1
    assert ended == [cut(row, NEW, end) for row in whole]
    for token in (NEVER, end):
        for max_tokens in (1, 150, 10**6):
            tokens_are_those_of_one_by_one(model, token, max_tokens, whole=whole)
    for limits in ((1,) * 9, (3, 1, 8, 2, 5, 5, 1, 7, 4)):
        tokens_are_those_of_one_by_one(model, end, limits=limits, whole=whole)


@everywhere
def test_an_answer_ends_at_whichever_end_comes_first(name: str) -> None:
    model = stirred(name).eval()
    whole = one_by_one(model, prompts(), LIMITS, NEVER)
    first = often(whole)
    second = often([cut(row, NEW, first) for row in whole])
    expected = [cut(cut(row, NEW, first), NEW, second) for row in whole]
    assert expected != [cut(row, NEW, first) for row in whole]
    assert generate(model, prompts(), LIMITS, {first, second, NEVER}, 10**6) == expected


def padding_is_seen(width: int, lengths: torch.Tensor) -> torch.Tensor:
    """A mutant mask: the padding behind a shorter prompt counts as text."""
    return torch.ones(len(lengths), width, dtype=torch.bool)


def prompt_is_hidden(width: int, lengths: torch.Tensor) -> torch.Tensor:
    """A mutant mask: the last token of a prompt is not seen."""
    return torch.arange(width) < lengths[:, None] - 1


@everywhere
@pytest.mark.parametrize("mutant", [padding_is_seen, prompt_is_hidden])
def test_a_wrong_mask_is_found(name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stirred(name).eval()
    monkeypatch.setattr(generation, "_prompt_positions", mutant)
    broken(tokens_are_those_of_one_by_one, model, NEVER)


class _Moved(nn.Module):
    """A mutant backbone: single tokens stand one place too far."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **given: Any) -> Any:
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"] + 1
        return self.backbone(**given)


@everywhere
def test_a_wrong_position_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stirred(name).eval()
    backbone, head = backbone_and_head(model)
    monkeypatch.setattr(generation, "backbone_and_head", lambda _: (_Moved(backbone), head))
    broken(tokens_are_those_of_one_by_one, model, NEVER)


@everywhere
def test_a_row_that_has_ended_costs_nothing_more(name: str) -> None:
    model = stirred(name).eval()
    end = often(one_by_one(model, prompts(), LIMITS, NEVER))
    backbone, _ = backbone_and_head(model)
    with Watch(backbone.get_input_embeddings()) as watch:
        found = generate(model, prompts(), LIMITS, [end], 10**6)
    longest, count = max(map(len, prompts())), len(prompts())
    steps = Counter(step for row in found for step in range(min(len(row), NEW - 1)))
    assert len(set(steps.values())) > 1
    assert watch.rows == [count * longest, *(steps[step] for step in sorted(steps))]


@everywhere
def test_a_batch_holds_no_more_tokens_than_allowed(name: str) -> None:
    model = stirred(name).eval()
    backbone, _ = backbone_and_head(model)
    with Watch(backbone.get_input_embeddings()) as watch:
        generate(model, prompts(), LIMITS, [NEVER], 150)
    prefills = [rows for rows in watch.rows if rows > len(prompts())]
    assert len(prefills) > 1 and max(watch.rows) <= 150


@everywhere
def test_generation_leaves_no_trace_in_the_model(name: str) -> None:
    model = stirred(name, "lora_r8", "nf4").eval()
    before = all_logits(model, range(20))
    generate(model, prompts(), LIMITS, [NEVER], 150)
    after = all_logits(model, range(20))
    assert torch.equal(before, after) and after.requires_grad
    assert model.config.use_cache is False


def test_nothing_to_answer_gives_nothing() -> None:
    assert generate(stirred(MINIATURES[0]), [], [], [NEVER], 64) == []


@everywhere
def test_progress_counts_every_row_once(name: str) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        stirred(name).eval(),
        prompts(),
        [2] * 9,
        [NEVER],
        100,
        lambda done, total: seen.append((done, total)),
    )
    assert len(seen) > 1 and seen[-1] == (len(prompts()), len(prompts())) and sorted(seen) == seen
