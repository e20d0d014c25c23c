"""What has become of a low-rank layer in training, from its factors alone: the spectrum of B A, and
how evenly A and B share it.

With QR decompositions B = Q_B R_B and A^T = Q_A R_A, the singular values of B A are those of the
small R_B R_A^T (r, r), since Q_B and Q_A have orthonormal columns: O(r^2 (out + in)), and B A is
never formed.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finrepro.methods.layers.low_rank import low_rank_layers


@dataclass(frozen=True)
class Spectrum:
    """Of one factor pair. A rank has collapsed where `effective_rank` is far below it; a direction
    is dead where `smallest` is nearly 0.

    `effective_rank` is exp of the entropy of the singular values' shares (Roy and Vetterli, 2007):
    r if all are equal, 1 if one is left.
    """

    rank: int
    largest: float  # sigma_1 of B A, its spectral norm
    smallest: float  # sigma_r over sigma_1
    effective_rank: float
    balance: float  # log of ||A||_F over ||B||_F: 0 where the two share B A evenly


def singular_values(a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"]) -> Float[Tensor, " r"]:
    """The first r singular values of B A, descending, in float64; r is at most in and at most
    out.
    """
    inner = torch.linalg.qr(b.double(), mode="r").R @ torch.linalg.qr(a.double().T, mode="r").R.T
    return torch.linalg.svdvals(inner)


def spectrum(a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"]) -> Spectrum:
    """Of factors in full precision. Where B A is zero, so is every figure but the balance, which
    is then not a number.
    """
    values = singular_values(a, b)
    total, largest = float(values.sum()), float(values[0])
    shares = values[values > 0] / total if total else values[:0]
    first, last = (float(torch.linalg.matrix_norm(each.double())) for each in (a, b))
    return Spectrum(
        rank=len(a),
        largest=largest,
        smallest=float(values[-1]) / largest if largest else 0.0,
        effective_rank=math.exp(-float((shares * shares.log()).sum())) if total else 0.0,
        balance=math.log(first / last) if first and last else math.nan,
    )


@torch.no_grad()
def spectra(model: nn.Module) -> dict[str, Spectrum]:
    """Name -> spectrum of every factor pair of a low-rank model. Raises `ValueError` where the
    factors are stored in codes.
    """
    found = {}
    for name, layer in low_rank_layers(model).items():
        a, b = layer.a.weight, layer.b.weight
        if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
            raise ValueError(
                f"the factors of {name} are quantized: a spectrum is of those that were trained"
            )
        found[name] = spectrum(a, b)
    return found
