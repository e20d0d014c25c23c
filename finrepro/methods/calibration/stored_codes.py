"""The entropy of the codes that bitsandbytes gives blocks on a CPU, without writing them out."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from finrepro.methods.calibration import entropy, objectives


def entropy_scores(
    blocks: Float[Tensor, "blocks size"], shifts: Float[Tensor, " blocks"], quant_type: str
) -> Float[Tensor, " blocks"]:
    """As `objectives.scores`, but of the codes of w - shift in the dtype of the weight.

    bitsandbytes divides by absmax, that is multiplies with its reciprocal, and a weight has the
    code of the first bound that is not below it (its `default` kernel of `quantize_4bit`).
    Subtracting and rounding keep the order, so that sorted blocks stay sorted.
    """
    ordered = torch.from_numpy(np.sort(blocks.float().numpy(), axis=1))
    moved = (ordered - shifts[:, None]).to(blocks.dtype).float()
    largest = torch.maximum(moved[:, -1], -moved[:, 0])
    scaled = torch.clamp(moved * (1.0 / largest.clamp(min=1e-38))[:, None], -1, 1)
    bounds = objectives.middles(objectives.sorted_levels(quant_type, blocks.device))
    upto = torch.searchsorted(
        scaled, bounds.expand(len(scaled), -1).contiguous(), right=True, out_int32=True
    )
    return torch.from_numpy(entropy.scores(upto.numpy(), blocks.shape[1]))
