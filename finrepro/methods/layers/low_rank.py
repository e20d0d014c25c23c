"""Low-rank linear layers (FinGPT-HPC, arXiv 2402.13533): y = B (A x) + b with A (r, in) and B (out,
r) in place of W (out, in).

The factors are plain linear layers, children `a` and `b`, so that whatever quantizes or adapts a
linear layer finds them. They begin as the best approximation of a dense weight: truncated singular
value decomposition, W ~ U_r S_r V_r^T, split evenly, A = sqrt(S_r) V_r^T and B = U_r sqrt(S_r), so
that B^T B = A A^T (spectral initialisation, Khodak et al., 2021, arXiv 2105.01029). Of a freshly
drawn weight this initialises a model that is trained from scratch; of a trained one it decomposes
it. A residual scaling of the drawn weight comes along.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finrepro.methods.layers.linear import features
from finrepro.methods.layers.principal import principal_factors


class LowRankLinear(nn.Module):
    """y = B (A x) + b; the bias is B's. 2 r (in + out) floating-point operations a position, and
    as many weights by half.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.a = nn.Linear(in_features, rank, bias=False, **options)
        self.b = nn.Linear(rank, out_features, bias=bias, **options)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """One narrow product after the other: B A is never formed."""
        y: Tensor = self.b(self.a(x))
        return y


class SplitLowRankLinear(nn.Module):
    """GPT-2's fused query, key and value as three low-rank layers of their own, one behind the
    other in the output.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.q, self.k, self.v = (
            LowRankLinear(in_features, out_features // 3, rank, bias, **options) for _ in "qkv"
        )

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Query, key and value of each position."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Name -> factor pair, in the model's order; of a split layer each of the three."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)
    }


def like(layer: nn.Module, rank: int | None, split: bool = False) -> nn.Module:
    """A layer of the same size, dtype and device: of this rank, or for None a plain `nn.Linear`.
    Its values are not set.
    """
    inputs, outputs = features(layer)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    bias = layer.bias is not None
    if rank is None:
        return nn.Linear(inputs, outputs, bias, **options)
    return (SplitLowRankLinear if split else LowRankLinear)(inputs, outputs, rank, bias, **options)


def factors(
    weight: Float[Tensor, "d_out d_in"], rank: int, svd_niter: int | None, rescale: bool, seed: int
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """(A, B) in float32, balanced, with B A the weight's best approximation of this rank; see
    `principal_factors`.

    It has the norm sqrt(S_1^2 + ... + S_r^2), less than the weight's; with `rescale` both factors
    grow until ||B A||_F = ||W||_F.
    """
    a, b = principal_factors(weight, rank, svd_niter, seed)
    if not rescale:
        return a, b
    growth = (torch.linalg.matrix_norm(weight.float()) / product_norm(a, b)).sqrt()
    return a * growth, b * growth


def product_norm(a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"]) -> Float[Tensor, ""]:
    """||B A||_F without B A: its square is the sum of the entries of (B^T B) * (A A^T)."""
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


@torch.no_grad()
def fill(layer: nn.Module, weight: Tensor, bias: Tensor | None, **options: Any) -> None:
    """Give a layer made by `like` the values of a dense one: its weight (out, in) and its bias.

    `options` are those of `factors` beside the weight and the rank.
    """
    if isinstance(layer, SplitLowRankLinear):
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        projections = (layer.q, layer.k, layer.v)
        for pair, rows, chunk in zip(projections, weight.chunk(3), biases, strict=True):
            fill(pair, rows, chunk, **options)
        return
    if isinstance(layer, LowRankLinear):
        a, b = factors(weight, layer.rank, **options)
        layer.a.weight, layer.b.weight = (
            nn.Parameter(factor.to(weight.dtype).contiguous()) for factor in (a, b)
        )
        last = layer.b
    else:
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(weight.contiguous())
        last = layer
    if bias is not None:
        last.bias = nn.Parameter(bias.contiguous())


@torch.no_grad()
def dense_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight (out, in) and the bias of the dense layer that computes the same; B A is formed
    in float32 and rounded once.
    """
    if isinstance(layer, SplitLowRankLinear):
        dense = [dense_weight(pair) for pair in (layer.q, layer.k, layer.v)]
        biases = [bias for _, bias in dense if bias is not None]
        return torch.cat([weight for weight, _ in dense]), torch.cat(biases) if biases else None
    if isinstance(layer, LowRankLinear):
        a, b = layer.a.weight, layer.b.weight
        return (b.float() @ a.float()).to(b.dtype), layer.b.bias
    assert isinstance(layer, nn.Linear)
    return layer.weight, layer.bias
