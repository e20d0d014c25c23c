"""Greedy generation in batches: the likeliest next token, with a key-value cache, until the end of
the text or a number of tokens.

Prompts stand on the left and their padding between them and what is generated, hidden by a mask
that we give ourselves: Transformers makes none for an attention implementation that it does not
know, and would let the padding be seen. A row that has ended leaves the batch.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finrepro.data import packing
from finrepro.evaluation.share_out import Progress, in_step, share_out
from finrepro.methods.layers.supervised import backbone_and_head
from finrepro.runtime import ranks

Tokens = tuple[int, ...]


def generate(
    model: nn.Module,
    prompts: Sequence[Tokens],
    limits: Sequence[int],
    ends: Collection[int],
    max_tokens: int,
    progress: Progress | None = None,
) -> list[Tokens | None]:
    """What follows each prompt: at most as many token ids as its limit, without the first
    token that is one of `ends`; None where the logits of a token are not finite.

    A limit is at least 1. A batch holds at most `max_tokens` positions, those to be generated and
    padding included (a single longer row has a batch of its own). What a row gets does not depend
    on the rows beside it, up to the rounding of the arithmetic.
    """
    device = next(model.parameters()).device
    together = in_step(model)
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]

    def compute(rows: packing.ExampleIndices) -> list[Tokens | None]:
        return _continue(
            model,
            [prompts[row] for row in rows],
            [limits[row] for row in rows],
            ends,
            device,
            together,
        )

    return share_out(
        packing.padded(list(range(len(prompts))), lengths, max_tokens),
        compute,
        together=together,
        progress=progress,
    )


@torch.inference_mode()
def _continue(
    model: nn.Module,
    prompts: Sequence[Tokens],
    limits: Sequence[int],
    ends: Collection[int],
    device: torch.device,
    together: bool,
) -> list[Tokens | None]:
    """The continuations of one batch. With `together` it goes on until no rank has a row left."""
    from transformers import DynamicCache

    backbone, head = backbone_and_head(model)
    answers: list[list[int] | None] = [[] for _ in prompts]
    width = max(map(len, prompts))
    ids = torch.tensor(
        [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device
    )
    depth = torch.tensor(
        [len(prompt) for prompt in prompts], device=device
    )  # the position of the next token
    visible = _prompt_positions(width, depth)
    going: list[int | None] = list(
        range(len(prompts))
    )  # whose row it is, in the order of the cache; None: nobody's any more
    cache: Any = DynamicCache()
    # Padding stands behind a prompt, where causal attention does not see it: no mask yet.
    hidden = backbone(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    last = hidden[torch.arange(len(prompts), device=device), depth - 1]
    while True:
        logits = head(last).float()
        next_tokens = logits.argmax(-1)
        # NaN is larger than every number: where there is one, it is the largest logit.
        numbers = logits.gather(-1, next_tokens[:, None])[:, 0].isfinite()
        unfinished = []
        for place, (row, token, is_number) in enumerate(
            zip(going, next_tokens.tolist(), numbers.tolist(), strict=True)
        ):
            if row is None:
                continue
            answer = answers[row] if is_number else None
            answers[row] = answer
            if answer is not None and token not in ends:
                answer.append(token)
                if len(answer) < limits[row]:
                    unfinished.append(place)
        if not (ranks.any_rank(bool(unfinished), device) if together else unfinished):
            return [None if answer is None else tuple(answer) for answer in answers]
        going = [going[place] for place in unfinished] or [None]
        if len(going) < len(next_tokens):
            keep = torch.tensor(unfinished or [0], device=device)
            cache.batch_select_indices(keep)
            next_tokens, depth, visible = next_tokens[keep], depth[keep], visible[keep]
        visible = torch.cat([visible, visible.new_ones(len(visible), 1)], dim=1)
        hidden = backbone(
            input_ids=next_tokens[:, None],
            position_ids=depth[:, None],
            attention_mask=visible[:, None, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        last, depth = hidden[:, -1], depth + 1


def _prompt_positions(width: int, lengths: Tensor) -> Tensor:
    """(rows, width), true where a row's prompt stands and not its padding."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]
