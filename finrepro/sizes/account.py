"""What a model's sizes alone say: parameters and where they are, bytes, operations and memory.

Exact, but for the memory to train, which is an estimate. It imports no torch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from finrepro.kinds import quantizer_of
from finrepro.settings import Choice, Positive, PositiveFloat, settings
from finrepro.sizes import flops, memory
from finrepro.sizes.shapes import block_sizes, depth


@settings
class Computed:
    """What a table without cells is computed for: catalogue entries, sequence lengths (tokens),
    and what they are trained as.
    """

    models: tuple[str, ...]
    lengths: tuple[
        Positive, ...
    ]  # of the shares of compute; left out where a model has no positions for them
    tokens: Positive  # a sequence, for operations and memory
    rank: Positive  # of the LoRA
    compression: PositiveFloat  # of the linear layers, and of the whole model, by low-rank factors


def account(model: Any, settings: Computed, stored: Mapping[str, Choice]) -> dict[str, Any]:
    """Every number of one model. `stored`: quantizers by name, of them `none`, `int8` and `nf4`."""
    linear = depth(model) * sum(i * o for i, o in block_sizes(model).values())
    head, total = flops.head_parameters(model), model.parameters
    tables = head + (
        flops.positions(model) * flops.width(model) if model.family == "gpt2" else head
    )  # GPT-2's head is its embedding
    lengths = [length for length in settings.lengths if length <= flops.positions(model)]
    return {
        "model": model.name,
        "parameters": total,
        "linear_parameters": linear,
        "linear_share": linear / total,
        "linear_share_with_head": (linear + head) / total,
        "linear_share_without_tables": linear / (total - tables),
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
            whole: _low_rank(model, settings, stored, whole == "whole_model")
            for whole in ("linear", "whole_model")
        },
    }


def shares(cost: flops.Flops) -> dict[str, float]:
    """The parts of a cost as shares of it. Backward costs twice what forward does, in every
    part: the shares of training are these.
    """
    return {part: getattr(cost, part) / cost.total for part in ("linear", "attention", "head")}


def _costs(model: Any, settings: Computed) -> dict[str, float]:
    """Operations a token of a sequence, attention counted in full."""
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
    """Estimates of bytes to train on one sequence with block checkpointing."""
    trained = {
        "full": memory.full_bytes(model, settings.tokens),
        "lora": memory.lora_bytes(model, stored["none"], settings.rank, settings.tokens),
        "qlora": memory.lora_bytes(model, stored["nf4"], settings.rank, settings.tokens),
    }
    return {
        name: {**dataclasses.asdict(each), "total": each.total} for name, each in trained.items()
    }


def _low_rank(
    model: Any, settings: Computed, stored: Mapping[str, Choice], whole: bool
) -> dict[str, Any]:
    """The model with its linear layers factored at the largest rank that reaches the
    compression; rank 0 where none does.
    """
    rank = flops.rank_for(model, settings.compression, whole)
    if not rank:
        return {"rank": 0}
    sizes = flops.factored(block_sizes(model), rank)
    linear = depth(model) * sum(i * o for i, o in block_sizes(model).values())
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
