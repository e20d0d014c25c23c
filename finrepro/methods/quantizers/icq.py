"""Information calibration quantization (ICQ) of IR-QLoRA (Qin et al., 2024, arXiv 2402.05445,
section 3.2), stored by bitsandbytes.

Each block w is moved by a number tau before it is rounded, W' = W - tau, and moved back after: w^ =
C[q] absmax(w - tau) + tau, where tau maximises the entropy of the block's 16-valued codes, H =
-sum_c p_c log2 p_c, among f absmax(w - median) + median for f in a small range.

Ours differs from the official code in three things. The published search leaves 5 to 6 % of
normal blocks with less entropy than without it: here tau = 0 is a candidate, and is taken where the
rounded tau is no better (`fallback`). Codes are computed after tau has been rounded to 8 bits, not
before, so that what is subtracted is what is added. Ties, which most blocks have, go to the
smallest |tau| and then to the earlier candidate, which does not depend on the order of the grid
(`tie_break: first` is the official order).

tau is stored as double quantization stores scales, but signed: 8-bit codes and a 16-bit scale for
each 256 of them. With a block of B weights that is 8 / B + 16 / (256 B) bits a weight: 0.126 at 64.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from finrepro.errors import UsageError
from finrepro.methods.quantizers import bnb_4bit
from finrepro.settings import Choice, Positive, PositiveFloat, settings

if TYPE_CHECKING:
    from torch import Tensor, nn

KEPT_APART = "the shifts of its blocks"  # what a method that reads a layer's weight would miss
BESIDE = (
    "icq_tau_code",
    "icq_tau_scale",
    "icq_weight_sha256",
)  # a layer's tensors that only this package reads
VERSION = 1  # of the search and of how tau is rounded: another one gives other bits
AT_ONCE = 2**20  # candidates that are looked at together: about 100 MB, however large the weight


@settings
class Config(bnb_4bit.Config):
    """bitsandbytes' settings and the search's: 2 n + 1 factors f from -range_factor sigma to
    +range_factor sigma (the paper's lambda), with sigma that of NormalFloat4 (0.541).

    With `objective: mse` tau is that of the least squared error: the control at the same storage.
    """

    n: Positive
    range_factor: PositiveFloat
    objective: Literal["entropy", "mse"]
    fallback: bool
    tie_break: Literal["smallest", "first"]


@dataclass(frozen=True)
class Stored:
    """W' as bitsandbytes stores it, and tau: codes (out, in / block), a scale for each 256 of
    them, and the 256 levels.
    """

    moved: bnb_4bit.Stored
    codes: "Tensor"
    scales: "Tensor"
    levels: "Tensor"
    config: Config


def supports(model: Any, quantizer: Choice, zero_stage: int) -> str | None:
    """None, or that a block would reach over the end of a row, where its tau is no longer a
    number a row and a block of inputs.
    """
    return bnb_4bit.misaligned(model, quantizer)


def encode(weight: "Tensor", config: Config) -> Stored:
    """Search tau and quantize a weight of shape (out, in), on its device; what was searched
    before is read from the cache (`calibration.cache`). Raises `UsageError` unless blocks divide
    the weight's rows.
    """
    import bitsandbytes
    import torch

    from finrepro.methods.calibration.cache import cached

    if weight.shape[1] % config.block_size:
        raise UsageError(
            f"icq: blocks of {config.block_size} do not divide rows of {weight.shape[1]} weights."
        )

    def searched() -> "dict[str, Tensor]":
        tau = torch.cat([search(blocks.float(), config) for blocks in _chunks(weight, config)])
        return rounded_tau(weight, tau, config)

    settings = f"icq {VERSION} {config} bitsandbytes {bitsandbytes.__version__}"
    return _moved_by(weight, cached(weight, settings, searched), config)


def with_tau(weight: "Tensor", tau: "Tensor", config: Config) -> Stored:
    """Quantize a weight (out, in) with a tau for each block, row by row; with `fallback`, 0 is
    taken where the rounded tau is no better.
    """
    return _moved_by(weight, rounded_tau(weight, tau, config), config)


def rounded_tau(weight: "Tensor", tau: "Tensor", config: Config) -> "dict[str, Tensor]":
    """The codes (blocks,), scales and levels that tau (blocks,) is rounded to; with `fallback`,
    the code of 0 where the rounded tau is no better.
    """
    import torch
    from bitsandbytes import functional

    from finrepro.methods.layers.shift import GROUP, dequantized

    codes, state = functional.quantize_blockwise(tau.contiguous(), blocksize=GROUP)
    # 16 bits as in the paper; bfloat16 has float32's range, so that no weight's scale is too small
    # or too large for it.
    scales, levels = state.absmax.bfloat16(), state.code
    zero = int((levels == 0).nonzero())
    codes[tau == 0] = zero  # where a whole group is zero, the library's code is another
    if config.fallback:
        shifts = dequantized(codes, scales, levels).split(_blocks_at_once(config))
        better = [
            _quality(blocks, shift, config) > _quality(blocks, shift * 0, config)
            for blocks, shift in zip(_chunks(weight, config), shifts, strict=True)
        ]
        codes[~torch.cat(better)] = zero
    return {"codes": codes, "scales": scales, "levels": levels}


def _moved_by(weight: "Tensor", tau: "dict[str, Tensor]", config: Config) -> Stored:
    """A weight (out, in) quantized after it was moved by a `rounded_tau`."""
    import torch

    from finrepro.methods.layers.shift import dequantized

    shifts = dequantized(tau["codes"], tau["scales"], tau["levels"])
    moved = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    at_once = _blocks_at_once(config)
    targets = moved.view(-1, config.block_size).split(at_once)
    for target, blocks, shift in zip(
        targets, _chunks(weight, config), shifts.split(at_once), strict=True
    ):
        target.copy_(_moved(blocks, shift))
    codes = tau["codes"].view(weight.shape[0], weight.shape[1] // config.block_size)
    return Stored(bnb_4bit.encode(moved, config), codes, tau["scales"], tau["levels"], config)


def decode(stored: Stored) -> "Tensor":
    """The weight (out, in) that codes and tau stand for, in the dtype it had."""
    from finrepro.methods.layers.shift import dequantized

    weight = bnb_4bit.decode(stored.moved)
    tau = dequantized(stored.codes, stored.scales, stored.levels).repeat_interleave(
        stored.config.block_size, 1
    )
    return (weight + tau).to(weight.dtype)


def linear(stored: Stored, bias: "Tensor | None") -> "nn.Module":
    """A frozen bitsandbytes layer around W' that adds tau's share; PEFT takes it for the linear
    layer that it is.
    """
    layer = bnb_4bit.linear(stored.moved, bias, _layer_class())
    layer.keep_shift(stored.codes, stored.scales, stored.levels)  # type: ignore[operator]
    return layer


def weight(layer: Any) -> "Tensor":
    """The weight (out, in) that a layer of `linear` stands for, shifts included, in the dtype it
    had.
    """
    moved = bnb_4bit.weight(layer)
    tau = layer.tau()
    return (moved + tau.repeat_interleave(moved.shape[1] // tau.shape[1], 1)).to(moved.dtype)


loading = bnb_4bit.loading  # of the layers around W'


def own_base(config: Config) -> str:
    """Why Transformers would make another base of the same weights."""
    return "its blocks are moved before they are rounded (ICQ), which Transformers does not do"


def layer_bytes(config: Config, inputs: int, outputs: int, dtype_bits: int) -> int:
    """`stored_bytes` of a linear layer's weight, from its size: bitsandbytes' and tau's, a byte
    a block and 2 for each 256.
    """
    blocks = inputs * outputs // config.block_size
    return (
        blocks
        + 2 * math.ceil(blocks / 256)
        + bnb_4bit.layer_bytes(config, inputs, outputs, dtype_bits)
    )


def stored_bytes(stored: Stored) -> int:
    """Bytes as they lie in memory: what bitsandbytes stores of W', and tau's codes and scales."""
    return bnb_4bit.stored_bytes(stored.moved) + stored.codes.nbytes + stored.scales.nbytes


def search(blocks: "Tensor", config: Config) -> "Tensor":
    """The best tau of each block, (blocks,), not yet rounded, for blocks of shape (blocks, block
    size) in float32.

    The objective is that of the levels nearest to (w - tau) / absmax(w - tau), with absmax not
    rounded.
    """
    from finrepro.methods.calibration.search import Candidates, best_tau

    names = (field.name for field in dataclasses.fields(Candidates))
    return best_tau(blocks, Candidates(**{name: getattr(config, name) for name in names}))


def _quality(blocks: "Tensor", tau: "Tensor", config: Config) -> "Tensor":
    """The objective of each block, (blocks,), larger is better, from the codes that bitsandbytes
    gives it.
    """
    import torch

    from finrepro.methods.calibration import objectives, stored_codes

    if config.objective == "entropy" and blocks.device.type == "cpu":
        return stored_codes.entropy_scores(blocks, tau, config.quant_type)
    moved = _moved(blocks, tau).float()
    stored = bnb_4bit.encode(
        moved, dataclasses.replace(config, double_quant=False, quant_storage="uint8")
    )
    if config.objective == "mse":
        return -(bnb_4bit.decode(stored) + tau[:, None] - blocks.float()).double().square().sum(1)
    codes = stored.codes.view(len(blocks), -1)
    codes = torch.cat([codes >> 4, codes & 15], 1)
    counts = torch.stack([(codes == code).sum(1) for code in range(16)], 1)
    return -objectives.count_logs(blocks.shape[1], blocks.device)[counts].sum(1)


def _moved(blocks: "Tensor", tau: "Tensor") -> "Tensor":
    """W' in the dtype of the weight."""
    return (blocks.float() - tau[:, None]).to(blocks.dtype)


def _chunks(weight: "Tensor", config: Config) -> "tuple[Tensor, ...]":
    """The blocks of a weight, as many at a time as are looked at together."""
    blocks: tuple[Tensor, ...] = (
        weight.detach().reshape(-1, config.block_size).split(_blocks_at_once(config))
    )
    return blocks


def _blocks_at_once(config: Config) -> int:
    return max(1, AT_ONCE // (2 * config.n + 2))


@cache
def _layer_class() -> Any:
    import bitsandbytes

    from finrepro.methods.layers.shift import Shifted

    class ShiftedLinear4bit(Shifted, bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
        """bitsandbytes' layer with tau."""

    return ShiftedLinear4bit
