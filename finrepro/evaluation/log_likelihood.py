"""Log-likelihoods in as few and as small forward passes as possible: shared beginnings once, only
the needed logits.

A prompt is computed once for all its answers: the answers' tokens follow it as branches that see
the prompt and themselves. What all prompts of a set begin with (the instruction) is computed once
for the whole set and kept as a key-value cache. Rows are sorted by length, and batches of them
shared out over the ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from finrepro.data import packing
from finrepro.data.batches import side_by_side
from finrepro.data.tokens import Encoded
from finrepro.evaluation.share_out import Progress, in_step, share_out
from finrepro.methods.layers.supervised import backbone_and_head, hidden_states, log_likelihood

SHORTEST_PREFIX = 8  # tokens; below, the cache costs more than it saves


@torch.inference_mode()
def text_log_likelihoods(
    model: nn.Module, texts: Sequence[Encoded], max_tokens: int, progress: Progress | None = None
) -> list[float]:
    """Summed natural log-probability of each example's answer."""
    device = next(model.parameters()).device
    _, head = backbone_and_head(model)
    lengths = [len(text.ids) for text in texts]

    def compute(rows: packing.ExampleIndices) -> list[float]:
        batch = side_by_side([texts[row] for row in rows]).to(device)
        logprobs = log_likelihood(head, hidden_states(model, batch)[batch.positions], batch.targets)
        parts = logprobs.double().cpu().split([texts[row].num_supervised for row in rows])
        return [float(part.sum()) for part in parts]

    batches = packing.padded(list(range(len(texts))), lengths, max_tokens)
    return share_out(batches, compute, together=in_step(model), progress=progress)


@torch.inference_mode()
def choice_log_likelihoods(
    model: nn.Module,
    items: Sequence[Sequence[Encoded]],
    max_tokens: int,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Summed natural log-probability of each choice of each item.

    `items[i]` holds the same prompt with each of its answers. Raises `ValueError` if the prompts of
    an item differ.
    """
    backbone, head = backbone_and_head(model)
    device = next(model.parameters()).device
    prompts, answers = _split(items)
    prefix = _shared_prefix(prompts)
    cache = _prefill(backbone, prefix, device) if prefix else None
    rests = [prompt[len(prefix) :] for prompt in prompts]
    lengths = [
        len(rest) + sum(len(a) - 1 for a in choices)
        for rest, choices in zip(rests, answers, strict=True)
    ]

    def compute(rows: packing.ExampleIndices) -> list[list[float]]:
        layout = [_branches(rests[row], answers[row], len(prefix)) for row in rows]
        return _one_pass(backbone, head, layout, len(prefix), cache, device)

    batches = packing.padded(list(range(len(items))), lengths, max_tokens)
    return share_out(batches, compute, together=in_step(model), progress=progress)


def _split(
    items: Sequence[Sequence[Encoded]],
) -> tuple[list[tuple[int, ...]], list[list[tuple[int, ...]]]]:
    """Each item's prompt ids and its answers' ids."""
    prompts, answers = [], []
    for choices in items:
        heads = {choice.ids[: choice.answer_start] for choice in choices}
        if len(heads) != 1:
            raise ValueError("the choices of an item must share their prompt")
        prompts.append(heads.pop())
        answers.append([choice.ids[choice.answer_start :] for choice in choices])
    return prompts, answers


def _shared_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What every prompt begins with, leaving at least one token of each; empty when it is not
    worth a cache.
    """
    if len(prompts) < 2:
        return ()
    first, last = min(prompts), max(prompts)  # what the extremes of the order share, all share
    longest = min(len(prompt) for prompt in prompts) - 1
    length = next((i for i in range(longest) if first[i] != last[i]), longest)
    return first[:length] if length >= SHORTEST_PREFIX else ()


def _prefill(
    backbone: nn.Module, prefix: tuple[int, ...], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the prefix, a pair a layer, each (1, kv_heads, prefix, head_dim)."""
    cache = backbone(
        input_ids=torch.tensor([prefix], device=device), use_cache=True
    ).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def _expanded(cache: list[tuple[Tensor, Tensor]], rows: int) -> Any:
    """A fresh key-value cache with the prefix in every row; the prefix itself is not copied
    until it is used.
    """
    from transformers import DynamicCache

    expanded = DynamicCache()
    for layer, (keys, values) in enumerate(cache):
        expanded.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return expanded


class _Row:
    """A prompt's rest with its answers as branches: ids, positions, and which logits score which
    choice.
    """

    def __init__(
        self, ids: list[int], depth: list[int], owner: list[int], picks: list[list[tuple[int, int]]]
    ) -> None:
        self.ids = ids  # token ids
        self.depth = depth  # position ids
        self.owner = owner  # -1 for the prompt, else the branch that a token belongs to
        self.picks = picks  # a choice: (index whose logits count, token id)


def _branches(rest: tuple[int, ...], answers: Sequence[tuple[int, ...]], offset: int) -> _Row:
    """Lay out a prompt and its answers; the last token of an answer is only predicted, never
    read.
    """
    ids, owner = list(rest), [-1] * len(rest)
    depth = list(range(offset, offset + len(rest)))
    picks = []
    for branch, answer in enumerate(answers):
        start = len(ids)
        ids += answer[:-1]
        owner += [branch] * (len(answer) - 1)
        depth += range(offset + len(rest), offset + len(rest) + len(answer) - 1)
        readers = [len(rest) - 1, *range(start, start + len(answer) - 1)]
        picks.append(list(zip(readers, answer, strict=True)))
    return _Row(ids, depth, owner, picks)


def _mask(layout: Sequence[_Row], width: int, prefix: int) -> Bool[Tensor, "rows 1 width keys"]:
    """Who sees whom: everyone the prefix and what stands before it in the prompt, a branch also
    itself.
    """
    owner = torch.full((len(layout), width), -2)
    for index, row in enumerate(layout):
        owner[index, : len(row.owner)] = torch.tensor(row.owner)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    own_branch = (owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None])
    visible = torch.ones(len(layout), width, prefix, dtype=torch.bool)
    return torch.cat([visible, own_branch & causal], dim=-1)[:, None]


def _one_pass(
    backbone: nn.Module,
    head: nn.Module,
    layout: Sequence[_Row],
    prefix: int,
    cache: list[tuple[Tensor, Tensor]] | None,
    device: torch.device,
) -> list[list[float]]:
    """One forward pass over rows; the summed log-probability of each choice of each row."""
    width = max(len(row.ids) for row in layout)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in layout], device=device)
    depth = torch.tensor(
        [row.depth + [prefix] * (width - len(row.depth)) for row in layout], device=device
    )
    plain = cache is None and all(owner == -1 for row in layout for owner in row.owner)
    options: dict[str, Any] = (
        {} if plain else {"attention_mask": _mask(layout, width, prefix).to(device)}
    )
    if cache is not None:
        options |= {"past_key_values": _expanded(cache, len(layout)), "use_cache": True}
    else:
        options["use_cache"] = False
    if not plain:
        options["position_ids"] = depth
    hidden = backbone(input_ids=ids, **options).last_hidden_state
    flat = [
        (index, reader, token)
        for index, row in enumerate(layout)
        for pick in row.picks
        for reader, token in pick
    ]
    rows, readers, tokens = torch.tensor(flat, device=device).T
    positions, inverse = torch.unique(rows * width + readers, return_inverse=True)
    logits: Float[Tensor, "needed vocab"] = head(hidden.flatten(0, 1)[positions]).float()
    logprobs = (logits[inverse, tokens] - logits.logsumexp(-1)[inverse]).double().cpu()
    values = iter(logprobs.tolist())
    return [[sum(next(values) for _ in pick) for pick in row.picks] for row in layout]
