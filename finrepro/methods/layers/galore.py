"""The step of GaLore (Zhao et al., 2024, arXiv 2403.03507): Adam in a subspace of the gradient that
is recomputed every T steps.

    m <= n:  P = U[:, :r],  R = P^T G (r, n),  W <- W - lr scale P N(R)
    m > n:   Q = V[:, :r],  R = G Q (m, r),    W <- W - lr scale N(R) Q^T

with G = U S V^T and N Adam's step on R, whose moments are of R. As in the paper they are not
rotated when P changes: for a while after a refresh they belong to the old directions. A singular
vector has no sign of its own; the largest entry of each is made positive, so that the gradient
alone decides the subspace.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def projection(gradient: Float[Tensor, "m n"], r: int) -> Float[Tensor, "side r"]:
    """The first `r` singular vectors of the shorter side: left where m <= n, else right.
    Orthonormal columns, also for a zero gradient.
    """
    if not gradient.isfinite().all():  # the loop stops the run; an SVD would raise first
        return torch.eye(min(gradient.shape), r, dtype=gradient.dtype, device=gradient.device)
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    vectors = u[:, :r] if on_the_left(gradient) else vh[:r].T
    return (vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()).contiguous()


def on_the_left(matrix: Float[Tensor, "m n"]) -> bool:
    """Whether the projection multiplies from the left: m <= n, of the weight as the layer stores
    it.
    """
    return matrix.shape[0] <= matrix.shape[1]


def down(gradient: Float[Tensor, "m n"], basis: Tensor) -> Tensor:
    """P^T G (r, n), or G Q (m, r)."""
    return basis.T @ gradient if on_the_left(gradient) else gradient @ basis


def up(step: Tensor, basis: Tensor, like: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """P N, or N Q^T: back to the weight's shape."""
    return basis @ step if on_the_left(like) else step @ basis.T


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW whose groups with a `rank` other than 0 are matrices, and step in a subspace of that
    many dimensions.

    In a process group all ranks step the same parameters, in the first rank's subspaces.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One step of every parameter that has a gradient; `closure` is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        count = state.get("step", 0)
        if group["rank"]:
            if count % group["update_proj_gap"] == 0:
                state["projection"] = _shared(projection(gradient, group["rank"]))
            gradient = down(gradient, state["projection"])
        if not count:
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(gradient),
                torch.zeros_like(gradient),
            )
        state["step"] = count + 1
        beta1, beta2 = group["betas"]
        first = state["exp_avg"].lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / (1 - beta2 ** (count + 1))).sqrt_().add_(group["eps"])
        step = first / root / (1 - beta1 ** (count + 1))
        if group["rank"]:
            step = up(step, state["projection"], parameter).mul_(group["step_scale"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"])


def _shared(basis: Tensor) -> Tensor:
    """The first rank's, where there are several: their weights have to agree, and an SVD may differ
    between two machines.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(basis, src=0)
    return basis
