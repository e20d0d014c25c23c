"""AdamW with Frobenius decay (Khodak et al., 2021, arXiv 2105.01029) for the factors of low-rank
layers.

A layer W = B A with A (r, in) and B (out, r) is decayed by the gradient of 0.5 ||B A||_F^2, and not
of 0.5 (||A||^2 + ||B||^2), whose least value at a given B A is its nuclear norm, which makes the
rank collapse:

    A <- A - lr lambda (B^T B) A,    B <- B - lr lambda B (A A^T)    both of the old A and B

Decoupled, as AdamW's own decay: the moments never see it. The authors have it in SGD's gradient;
decoupling is an extension. A layer's factors are its parameters `a.weight` and `b.weight`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from finrepro.kinds import adapter_of
from finrepro.methods.optimizers import adamw
from finrepro.settings import settings

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from finrepro.methods.optimizer_view import OptimizerView

state_bytes = adamw.state_bytes
A, B = ".a.weight", ".b.weight"


@settings
class Config(adamw.Config):
    """AdamW's, whose `weight_decay` then spares the factors, and the `frobenius_decay` lambda."""

    frobenius_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def supports(spec: Any, config: Config) -> str | None:
    """None for a low-rank model whose own weights are trained, or why not."""
    trains_all = adapter_of(spec.adapter).WHOLE_MODEL
    if spec.model.low_rank is not None and trains_all:
        return None
    whose = (
        f"{spec.model.name} has none"
        if spec.model.low_rank is None
        else f"{spec.adapter.name} trains none"
    )
    return f"adamw_frobenius decays the factors of low-rank layers, and {whose}"


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of each layer's A and B, in the order of `names`; a parameter without its partner
    is in no pair.
    """
    ordered = dict.fromkeys(names)
    return [
        (a, b) for a in ordered if a.endswith(A) and (b := f"{a.removesuffix(A)}{B}") in ordered
    ]


def build(named_parameters: list[tuple[str, Any]], lr: float, config: Config) -> "Optimizer":
    """The optimizer over (name, parameter) pairs, at learning rate `lr`; plain weight decay does
    not touch the factors.
    """
    import torch

    factors = {name for pair in pairs(name for name, _ in named_parameters) for name in pair}
    groups = adamw.decay_groups(named_parameters, config.weight_decay, factors)
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, foreach=True)


def before_step(view: "OptimizerView", config: Config, step: int, max_steps: int) -> None:
    """Decay each pair at the learning rate of its factors. Every rank calls it, and reads both
    factors gathered.
    """
    for names in pairs(view.trained):
        a, b = (view.trained[name] for name in names)
        old_a, old_b = view.value(a), view.value(b)
        gradient_a, gradient_b = decay_gradients(old_a, old_b)
        view.set(a, old_a - view.rate(a) * config.frobenius_decay * gradient_a)
        view.set(b, old_b - view.rate(b) * config.frobenius_decay * gradient_b)


def decay_gradients(a: "Tensor", b: "Tensor") -> "tuple[Tensor, Tensor]":
    """The gradients of 0.5 ||B A||_F^2: (B^T B) A (r, in) and B (A A^T) (out, r), in O(r^2 (in +
    out)).
    """
    return (b.T @ b) @ a, b @ (a @ a.T)
