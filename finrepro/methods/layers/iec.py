"""A linear layer with the low-rank update of IR-QLoRA's information-elastic connection (Qin et al.,
2024, arXiv 2402.05445, section 3.3).

    y = W x + s u,    z = (A + beta_A P) x,    u = (B + beta_B R) z,    s = alpha / r

P (r, in) and R (out, r) are constants: P cuts the input into gcd(r, in) runs of neighbouring
channels and gives the mean of each to r / gcd neighbouring ranks, R does the same from r to out
(appendix A.2, Eq. 16). Means and copies are taken here; the matrices exist only when the update is
folded.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from finrepro.methods.layers.linear import features


def pool_and_repeat(x: Float[Tensor, "*batch size"], width: int) -> Float[Tensor, "*batch width"]:
    """Means of gcd(size, width) equal runs of neighbours, each repeated to fill its run of the
    result: `mean_matrix` times x.

    Neighbours stay together (1 1 2 2); repeated as a whole (1 2 1 2) they would be another
    function.
    """
    runs = math.gcd(x.shape[-1], width)
    means = x.unflatten(-1, (runs, -1)).mean(-1, keepdim=True)
    # An expanded view, whose gradient is a plain sum: that of `repeat_interleave` on CUDA may
    # depend on the order of atomic additions.
    return means.expand(*means.shape[:-1], width // runs).flatten(-2)


def mean_matrix(rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """P = mean_matrix(r, in) and R = mean_matrix(out, r), in double precision: g / columns where
    row and column are in the same of g = gcd(rows, columns) runs, else 0."""
    runs = math.gcd(rows, columns)
    same = torch.arange(rows)[:, None] // (rows // runs) == torch.arange(columns) // (
        columns // runs
    )
    return same.double() * (runs / columns)


class IECLinear(nn.Module):
    """Wraps a linear layer of any class, which it only calls, and adds the update; parameters and
    arithmetic of the update are float32.

    lora_A (r, in) ~ U(-1/sqrt(in), 1/sqrt(in)) from `generator`, lora_B (out, r) = 0, beta_A =
    beta_B = 0: nothing changes at first. The betas have shape [1]: optimizers that spare whatever
    is no matrix from weight decay spare them, and ZeRO, which flattens and splits parameters, has
    one element to lay somewhere. The shortcuts see the input without dropout.
    """

    def __init__(
        self,
        base_layer: Any,
        r: int,
        lora_alpha: int,
        lora_dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        d_in, d_out = features(base_layer)
        bound = d_in**-0.5
        # Drawn on the CPU, so that a seed means the same bits whatever the device.
        drawn = torch.empty(r, d_in, dtype=torch.float32, device="cpu").uniform_(
            -bound, bound, generator=generator
        )
        device = next(base_layer.parameters()).device
        self.lora_A = nn.Parameter(drawn.to(device))
        self.lora_B = nn.Parameter(torch.zeros(d_out, r, dtype=torch.float32, device=device))
        self.beta_A = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))
        self.beta_B = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))
        self.dropout = nn.Dropout(lora_dropout)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """In the input's dtype, rounded once."""
        base = self.base_layer(x)
        wide = x.to(self.lora_A.dtype)
        z = linear(self.dropout(wide), self.lora_A) + self.beta_A * pool_and_repeat(wide, self.r)
        u = linear(z, self.lora_B) + self.beta_B * pool_and_repeat(z, base.shape[-1])
        return (base + self.lora_alpha / self.r * u).to(x.dtype)

    @torch.no_grad()
    def folded(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        """A + beta_A P and B + beta_B R: the same update as plain LoRA, where there is no
        dropout. On the CPU, rounded once to float32.
        """
        folded = []
        for matrix, beta in ((self.lora_A, self.beta_A), (self.lora_B, self.beta_B)):
            rows, columns = matrix.shape
            folded.append(
                (matrix.cpu().double() + beta.cpu().double() * mean_matrix(rows, columns)).float()
            )
        return folded[0], folded[1]
