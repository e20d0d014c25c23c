"""AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101), PyTorch's own, every setting explicit."""

from typing import TYPE_CHECKING, Any

from finrepro.schema import settings

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

    groups = [
        {"params": [p for _, p in named_parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named_parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=config.betas, eps=config.eps, foreach=True
    )
