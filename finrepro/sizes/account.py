"""What a model's sizes alone say: parameters and where they are, bytes, operations and memory.

Exact, but for the memory to train, which is an estimate. It imports no torch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from finrepro.kinds import quantizer_of
from finrepro.settings import Choice, Positive, PositiveFloat, settings
from finrepro.sizes import flops, memory
from finrepro.sizes.shapes import block_sizes, depth, linear_parameters


@settings
class Computed:
    """What a table without cells is computed for: catalogue entries, and how they are trained."""

    models: tuple[str, ...]
    # Tokens a sequence, for the shares of compute; lengths without positions are left out.
    lengths: tuple[Positive, ...]
    tokens: Positive  # a sequence, for operations and memory
    rank: Positive  # of the LoRA
    compression: PositiveFloat  # of the linear layers, and of the whole model, by low-rank factors
    claims: str  # the file of configs/published whose claims are tested


def model_account(model: Any, settings: Computed, stored: Mapping[str, Choice]) -> dict[str, Any]:
    """Every number of one model: parameters, shares of them, bytes, FLOPs a token.

    `stored`: quantizers by name, among them `none`, `int8` and `nf4`.
    """
    linear = linear_parameters(model)
    head, total = flops.head_parameters(model), model.parameters
    # GPT-2's head is its token embedding; it has a table of positions besides.
    second_table = flops.positions(model) * flops.width(model) if model.family == "gpt2" else head
    embeddings = head + second_table
    lengths = [length for length in settings.lengths if length <= flops.positions(model)]
    return {
        "model": model.name,
        "parameters": total,
        "linear_parameters": linear,
        "linear_share": linear / total,
        "linear_share_with_head": (linear + head) / total,
        "linear_share_without_tables": linear / (total - embeddings),
        "tied": model.family == "gpt2" or bool(model.architecture.get("tie_word_embeddings")),
        "bytes": {
            name: memory.stored_bytes(model, quantizer) for name, quantizer in stored.items()
        },
        "nominal_bytes": {bits: total * bits // 8 for bits in (16, 8, 4)},
        "cache_bytes_per_token": memory.cache_bytes(model),
        "training_shares": {
            length: shares(flops.forward(model, length, causal=True)) for length in lengths
        },
        "serving_shares": {length: shares(flops.generated(model, length)) for length in lengths},
        "flops": _costs(model, settings),
        "memory": _memory(model, settings, stored),
        "low_rank": {
            goal: _low_rank(model, settings, stored, goal == "whole_model")
            for goal in ("linear", "whole_model")
        },
    }


def shares(cost: flops.Flops) -> dict[str, float]:
    """The terms of a cost as shares of it. The backward pass costs twice the forward pass in
    every term, so that these are the shares of training too.
    """
    return {term: getattr(cost, term) / cost.total for term in ("linear", "attention", "head")}


def _costs(model: Any, settings: Computed) -> dict[str, float]:
    """FLOPs a token of a sequence, attention counted in full."""
    tokens, rank = settings.tokens, settings.rank
    return {
        "forward": flops.forward(model, tokens).total,
        "full": flops.training(model, tokens).total,
        "full_checkpointed": flops.training(model, tokens, checkpointing=True).total,
        "lora": flops.training(model, tokens, rank).total,
        "lora_checkpointed": flops.training(model, tokens, rank, checkpointing=True).total,
        "generated": flops.generated(model, tokens).total,
    }


def _memory(
    model: Any, settings: Computed, stored: Mapping[str, Choice]
) -> dict[str, dict[str, int]]:
    """Estimated bytes to train on one sequence with block checkpointing."""
    estimates = {
        "full": memory.full_bytes(model, settings.tokens),
        "lora": memory.lora_bytes(model, stored["none"], settings.rank, settings.tokens),
        "qlora": memory.lora_bytes(model, stored["nf4"], settings.rank, settings.tokens),
    }
    return {
        name: dataclasses.asdict(estimate) | {"total": estimate.total}
        for name, estimate in estimates.items()
    }


def _low_rank(
    model: Any, settings: Computed, stored: Mapping[str, Choice], of_model: bool
) -> dict[str, Any]:
    """The model with its linear layers factored at the rank that comes nearest to the
    compression, of these layers or, with `of_model`, of the model; rank 0 where none does.
    """
    rank = flops.rank_for(model, settings.compression, of_model)
    if not rank:
        return {"rank": 0}
    sizes = flops.factored(block_sizes(model), rank)
    linear = linear_parameters(model)
    factors = depth(model) * sum(i * o for i, o in sizes.values())
    rest = model.parameters - linear
    packed = {
        name: 2 * rest
        + depth(model) * sum(quantizer_of(choice).layer_bytes(i, o, 16) for i, o in sizes.values())
        for name, choice in stored.items()
    }
    dense = flops.forward(model, settings.tokens).total
    return {
        "rank": rank,
        "parameters": rest + factors,
        "compression": model.parameters / (rest + factors),
        "linear_compression": linear / factors,
        "bytes": packed,
        "full": flops.training(model, settings.tokens, sizes=sizes).total,
        "speed_up_bound": dense / flops.forward(model, settings.tokens, sizes=sizes).total,
    }
