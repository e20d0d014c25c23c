"""A bottleneck adapter behind a sub-layer (Houlsby et al., 2019, arXiv 1902.00751, section 2.1): h
+ W_up gelu(W_down h + b_down) + b_up.

It acts on activations, so it does not matter how the sub-layer stores its weights, and it cannot be
folded into them.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

# Where a family keeps its blocks, and in a block the sub-layers whose output is added to the
# residual stream, and the norms.
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}
SUBLAYERS = {"gpt2": ("attn", "mlp"), "llama": ("self_attn", "mlp")}
NORMS = {"gpt2": ("ln_1", "ln_2"), "llama": ("input_layernorm", "post_attention_layernorm")}


class Bottleneck(nn.Module):
    """Wraps an attention or MLP sub-layer, which it only calls; parameters and arithmetic are
    float32.

    W_down (size, width) and W_up (width, size) are drawn from a normal distribution of standard
    deviation `init_std` truncated at two of them, W_up is zero with `zero_up`, and both biases are
    zero. GELU is its tanh form, as in the authors' code.
    """

    def __init__(
        self,
        sublayer: nn.Module,
        width: int,
        size: int,
        init_std: float,
        zero_up: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.sublayer = sublayer
        self.size, self.init_std, self.zero_up = size, init_std, zero_up
        device = next(sublayer.parameters()).device
        # Drawn on the CPU, so that a seed means the same bits whatever the device.
        self.down = nn.Linear(width, size, dtype=torch.float32, device="meta").to_empty(
            device="cpu"
        )
        self.up = nn.Linear(size, width, dtype=torch.float32, device="meta").to_empty(device="cpu")
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(
                layer.weight, std=init_std, a=-2 * init_std, b=2 * init_std, generator=generator
            )
            nn.init.zeros_(layer.bias)
        if zero_up:
            nn.init.zeros_(self.up.weight)
        self.down.to(device)
        self.up.to(device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the sub-layer gives, its hidden states adapted; attention gives its weights
        beside them.
        """
        output = self.sublayer(*args, **kwargs)
        return (
            (self.adapt(output[0]), *output[1:])
            if isinstance(output, tuple)
            else self.adapt(output)
        )

    def adapt(self, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """In the dtype of `h`, rounded once."""
        wide = h.to(self.down.weight.dtype)
        return (wide + self.up(gelu(self.down(wide), approximate="tanh"))).to(h.dtype)


class TrainedNorm(nn.Module):
    """A norm that is trained: in float32, whatever the model computes in; its output has the
    input's dtype.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.float().requires_grad_(True)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The norm of `x`, rounded once."""
        return self.norm(x.float()).to(x.dtype)
