"""AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101), PyTorch's own, every setting explicit."""

import re
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from finrepro.settings import settings

if TYPE_CHECKING:
    from torch.optim import Optimizer


@settings
class Config:
    """`weight_decay` is decoupled and applies to matrices only, not to norms and biases."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


def build(named_parameters: list[tuple[str, Any]], lr: float, config: Config) -> "Optimizer":
    """The optimizer over (name, parameter) pairs, at learning rate `lr`."""
    import torch

    return torch.optim.AdamW(
        decay_groups(named_parameters, config.weight_decay),
        lr=lr,
        betas=config.betas,
        eps=config.eps,
        foreach=True,
    )


def decay_groups(
    named_parameters: list[tuple[str, Any]], weight_decay: float, spared: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Two groups, with weight decay (matrices that are not `spared`) and without; empty ones are
    left out.
    """
    decayed = {
        name
        for name, parameter in named_parameters
        if len(shape_of(parameter)) >= 2 and name not in spared
    }
    groups = [
        {
            "params": [p for name, p in named_parameters if name in decayed],
            "weight_decay": weight_decay,
        },
        {"params": [p for name, p in named_parameters if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def shape_of(parameter: Any) -> Sequence[int]:
    """The full shape of a parameter: at ZeRO-3 it is sharded, with `shape` (0,), by the time the
    optimizer is built.
    """
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def in_blocks(name: str) -> bool:
    """Whether a parameter belongs to one of the model's numbered blocks; embeddings, the last
    norm and the output head do not.
    """
    return re.search(r"\.\d+\.", name) is not None


def state_bytes(shapes: Mapping[str, Sequence[int]], config: Config) -> int:
    """Bytes of the moments of parameters of these shapes: 8 an element. Closed form; a step
    count a parameter comes on top.
    """
    return 8 * sum(map(prod, shapes.values()))
