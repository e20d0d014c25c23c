"""No quantization: weights keep the model's own dtype."""

from typing import TYPE_CHECKING

from finrepro.settings import settings

if TYPE_CHECKING:
    from torch import Tensor


@settings
class Config:
    """No settings."""


def encode(weight: "Tensor", config: Config) -> "Tensor":
    """The weight itself, (out, in)."""
    return weight


def decode(stored: "Tensor") -> "Tensor":
    """The weight itself."""
    return stored


linear = None  # layers are left as they are


def layer_bytes(config: Config, inputs: int, outputs: int, dtype_bits: int) -> int:
    """`stored_bytes` of a linear layer's weight, from its size."""
    return inputs * outputs * dtype_bits // 8


def stored_bytes(stored: "Tensor") -> int:
    """Bytes as they lie in memory."""
    return stored.numel() * stored.element_size()
