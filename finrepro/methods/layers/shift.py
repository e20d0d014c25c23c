"""A constant added to each block of a linear layer's weight, stored beside the weight and applied
separately.

W + expand(T), where T (out, in / block) has one element for every block of `block` neighbouring
weights of a row. Since blocks run along the input, (W + expand(T)) x = W x + T P x with P x the
sums of x over its blocks: the base layer computes W x with its own kernels, and the addition costs
1 / block of its multiplications. P is the same for every row, so T P is a frozen LoRA of rank
in / block.

T is stored in 8 bits with a scale for every 256 of its entries (row by row), in buffers of the
layer: never under `weight.*`, where bitsandbytes and Transformers refuse what they do not know.
"""

import hashlib
from typing import Any

import torch
from jaxtyping import BFloat16, Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import linear

GROUP = 256  # entries of T that share a scale
SIDE_CAR = ("icq_tau_code", "icq_tau_scale")
# saved with the two, so that they are never loaded beside another weight
DIGEST = "icq_weight_sha256"


def dequantized(
    codes: UInt8[Tensor, "*shape"],
    scales: BFloat16[Tensor, " groups"],
    levels: Float[Tensor, "256"],
) -> Float[Tensor, "*shape"]:
    """The values of the codes, in float32: a level times the scale of its group."""
    flat = levels[codes.flatten().int()]
    return (flat * scales.float().repeat_interleave(GROUP)[: len(flat)]).view(codes.shape)


class Shifted(nn.Module):
    """Mixed into a linear layer with `in_features`, `weight` and `compute_dtype`, in front of
    its class.
    """

    in_features: int
    weight: nn.Parameter
    compute_dtype: torch.dtype
    icq_tau_code: Tensor
    icq_tau_scale: Tensor
    icq_levels: Tensor

    def keep_shift(
        self,
        codes: UInt8[Tensor, "d_out blocks"],
        scales: BFloat16[Tensor, " groups"],
        levels: Float[Tensor, "256"],
    ) -> None:
        """Take the side-car. The levels are the library's: the same in every layer, and not
        saved.
        """
        self.register_buffer("icq_tau_code", codes)
        self.register_buffer("icq_tau_scale", scales)
        self.register_buffer("icq_levels", levels, persistent=False)

    def tau(self) -> Float[Tensor, "d_out blocks"]:
        """T in float32."""
        return dequantized(self.icq_tau_code, self.icq_tau_scale, self.icq_levels)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The layer's own result and T P x, which is computed in the layer's compute dtype."""
        shift = block_sums(x.to(self.compute_dtype), self.icq_tau_code.shape[1])
        return super().forward(x) + linear(shift, self.tau().to(self.compute_dtype)).to(x.dtype)

    def as_frozen_lora(self) -> tuple[Float[Tensor, "blocks d_in"], Float[Tensor, "d_out blocks"]]:
        """The factors (A, B) of a LoRA of scaling 1 that, beside the plain layer of the same
        `weight`, computes the same: P and T.
        """
        blocks = self.icq_tau_code.shape[1]
        indicator = torch.eye(blocks, device=self.icq_levels.device).repeat_interleave(
            self.in_features // blocks, 1
        )
        return indicator, self.tau()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """To another device with the weight, but never to another dtype."""
        buffers = {name: self._buffers[name] for name in ("icq_tau_scale", "icq_levels")}
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(self.icq_tau_code.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + DIGEST] = digest(self.weight)

    def _load_from_state_dict(self, state: Any, prefix: str, *arguments: Any) -> None:
        """Adds an error, and loads nothing, where the side-car is incomplete or belongs to
        another weight; strict or not.
        """
        unexpected, errors = arguments[-2:]
        present = [name for name in (*SIDE_CAR, DIGEST) if prefix + name in state]
        if present or prefix + "weight" in state:
            if len(present) < 3:
                missing = next(name for name in (*SIDE_CAR, DIGEST) if name not in present)
                errors.append(
                    f"{prefix}{missing} is missing: without its shift the weight is another."
                )
                return
            if not torch.equal(
                digest(state.get(prefix + "weight", self.weight)), state[prefix + DIGEST].cpu()
            ):
                errors.append(f"{prefix}{SIDE_CAR[0]} belongs to another weight than this one.")
                return
        super()._load_from_state_dict(state, prefix, *arguments)
        unexpected[:] = [name for name in unexpected if name != prefix + DIGEST]


def block_sums(x: Float[Tensor, "*batch d_in"], blocks: int) -> Float[Tensor, "*batch blocks"]:
    """P x: the sums over `blocks` equal runs of the last dimension."""
    return x.unflatten(-1, (blocks, -1)).sum(-1)


def digest(weight: Tensor) -> UInt8[Tensor, "32"]:
    """sha256 of a packed weight's bytes."""
    packed = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return torch.tensor(list(hashlib.sha256(packed.tobytes()).digest()), dtype=torch.uint8)
