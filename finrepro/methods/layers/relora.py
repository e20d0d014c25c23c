"""A linear layer under ReLoRA (Lialin et al., 2023, arXiv 2307.05695): y = W x + s B A x + c, with
W frozen until B A is merged into it.

W accumulates every merged update in float32: in the layer's own weight where that is float32 and
not sharded, else in a copy on the host, from which the weight is rounded. In bfloat16 most of an
update of a thousandth of W would be lost.
"""

import hashlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from finrepro.methods.layers.linear import features, is_conv1d
from finrepro.runtime.zero3 import whole


class ReloraLinear(nn.Module):
    """Wraps a linear layer and keeps its dtype: engines that train bfloat16 keep float32 copies of
    what they train.

    `name` is the layer's in the model: with `seed` and the period it decides A. All ranks make it
    together.
    """

    def __init__(self, base_layer: Any, name: str, r: int, scale: float, seed: int) -> None:
        super().__init__()
        self.base_layer, self.name, self.r, self.scale, self.seed = base_layer, name, r, scale, seed
        weight, (_, d_out) = base_layer.weight, features(base_layer)
        self.lora_A = nn.Parameter(self.drawn(0).to(weight))
        self.lora_B = nn.Parameter(torch.zeros(d_out, r, dtype=weight.dtype, device=weight.device))
        # Not a buffer: engines would send it to every rank, and it is on the host.
        self.exact: Tensor | None = None
        if weight.dtype != torch.float32 or hasattr(weight, "ds_id"):
            self.exact = self._as_out_in(whole(weight)).float().cpu()

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """In the input's dtype."""
        return self.base_layer(x) + self.scale * linear(linear(x, self.lora_A), self.lora_B)

    def drawn(self, period: int) -> Float[Tensor, "r d_in"]:
        """A for a period, from U(-1 / sqrt(in), 1 / sqrt(in)), seeded by the seed, the period and
        the layer's name alone.
        """
        d_in, _ = features(self.base_layer)
        digest = hashlib.sha256(f"{self.seed} {period} {self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return (2 * torch.rand(self.r, d_in, generator=generator) - 1) / d_in**0.5

    def merged(
        self, a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"]
    ) -> Float[Tensor, "d_out d_in"]:
        """W + s B A in float32; every rank calls it where the weight is sharded."""
        return torch.addmm(self.frozen().to(a.device), b.float(), a.float(), alpha=self.scale)

    def frozen(self) -> Float[Tensor, "d_out d_in"]:
        """W in float32; every rank calls it where the weight is sharded."""
        return (
            self._as_out_in(whole(self.base_layer.weight)).float()
            if self.exact is None
            else self.exact
        )

    def stored(self, merged: Float[Tensor, "d_out d_in"]) -> Tensor:
        """A weight as the layer stores it, rounded once."""
        return self._as_out_in(merged).to(self.base_layer.weight.dtype).contiguous()

    def _as_out_in(self, weight: Tensor) -> Tensor:
        """(out, in) of what the layer stores, and the reverse."""
        return weight.T if is_conv1d(self.base_layer) else weight
