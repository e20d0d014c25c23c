"""AdamW with its moments in 8 bits (Dettmers et al., 2022, arXiv 2110.02861), bitsandbytes' own, on
CPUs and GPUs alike.

Each block of 256 numbers of a moment is divided by its largest magnitude and rounded to the nearest
of 256 values (a dynamic tree, signed for the first moment, not for the second); a step decodes
them, computes in float32 and rounds them again. 2 bytes and 8 / 256 a parameter in place of 8. As
in the paper, what has fewer than 4,096 elements keeps float32, and with `embeddings_32bit` so do
the embeddings and the output head, whose gradients are rare and large.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from finrepro.kinds import adapter_of
from finrepro.methods.optimizers import adamw
from finrepro.settings import settings

if TYPE_CHECKING:
    from torch.optim import Optimizer

SMALLEST, BLOCK = 4096, 256  # elements: what is smaller keeps float32; numbers that share a scale


@settings
class Config(adamw.Config):
    """AdamW's, and whether parameters outside of the blocks keep moments in float32."""

    embeddings_32bit: bool


def supports(spec: Any, config: Config) -> str | None:
    """None where each parameter is stepped by itself, or why not."""
    if spec.train.zero_stage:
        return (
            "adamw_8bit rounds each parameter's moments by themselves, and "
            f"ZeRO-{spec.train.zero_stage} steps flat pieces"
        )
    if adapter_of(spec.adapter).RESETS_MOMENTS:
        return (
            f"{spec.adapter.name} begins moments anew, and nobody here knows how to in adamw_8bit's"
        )
    return None


def bits(name: str, size: int, config: Config) -> int:
    """Bits of each element of a parameter's moments."""
    return 32 if size < SMALLEST or (config.embeddings_32bit and not adamw.in_blocks(name)) else 8


def state_bytes(shapes: Mapping[str, Sequence[int]], config: Config) -> int:
    """Bytes of the moments and their scales, of parameters of these shapes; the two maps of 256
    values, 2 KiB a device, come on top.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    return sum(
        8 * n if bits(name, n, config) == 32 else 2 * n + 8 * -(-n // BLOCK)
        for name, n in sizes.items()
    )


def build(named_parameters: list[tuple[str, Any]], lr: float, config: Config) -> "Optimizer":
    """The optimizer over (name, parameter) pairs, at learning rate `lr`."""
    from bitsandbytes.optim import AdamW8bit

    class ByGroup(AdamW8bit):  # type: ignore[misc]
        """Reads `optim_bits` from the group; the library keeps them in a global register, by the
        parameter's position.
        """

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            return {**config, "optim_bits": group["optim_bits"]}

    groups = []
    for width in (8, 32):
        members = [
            (name, p) for name, p in named_parameters if bits(name, p.numel(), config) == width
        ]
        groups += [
            {**group, "optim_bits": width}
            for group in adamw.decay_groups(members, config.weight_decay)
        ]
    optimizer: Optimizer = ByGroup(
        groups, lr=lr, betas=config.betas, eps=config.eps, min_8bit_size=SMALLEST
    )
    return optimizer
