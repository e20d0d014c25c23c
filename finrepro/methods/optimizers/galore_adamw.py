"""GaLore (Zhao et al., 2024, arXiv 2403.03507) with AdamW: dense weights whose moments live in a
subspace of the gradient.

The matrices of the blocks are stepped in the subspace; embeddings, output head, norms and biases by
plain AdamW. `finrepro.methods.layers.galore` has the equations. Written from the paper; the
authors' package is not used, since it does not support Conv1D.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from finrepro.kinds import adapter_of
from finrepro.methods.optimizers import adamw
from finrepro.settings import Positive, PositiveFloat, Share, settings

if TYPE_CHECKING:
    from torch.optim import Optimizer


@settings
class Config(adamw.Config):
    """AdamW's, and the authors' names: `rank` is whole, or a share of each matrix' shorter side;
    the subspace is found anew every `update_proj_gap` steps, at the first one too; `step_scale`,
    their `scale`, multiplies the step of a projected matrix."""

    rank: Positive | Share
    update_proj_gap: Positive
    step_scale: PositiveFloat


def supports(spec: Any, config: Config) -> str | None:
    """None where dense weights are trained and no gradient is sharded, or why not."""
    from finrepro.sizes.shapes import block_sizes

    if spec.train.zero_stage:
        return (
            "galore_adamw needs each matrix' whole gradient, and "
            f"ZeRO-{spec.train.zero_stage} steps flat pieces"
        )
    adapter = adapter_of(spec.adapter)
    if spec.model.low_rank is not None:
        return (
            "galore_adamw steps dense weights in a subspace, and those of "
            f"{spec.model.name} are factors"
        )
    if adapter.RESETS_MOMENTS or not adapter.WHOLE_MODEL:
        return (
            f"galore_adamw steps dense weights in a subspace, and {spec.adapter.name} trains others"
        )
    for name, sides in block_sizes(spec.model).items():
        if config.rank > min(sides):
            return (
                f"galore_adamw: rank {config.rank} is more than {spec.model.name} can have in "
                f"{name}, {sides[0]} in and {sides[1]} out"
            )
    return None


def rank_of(name: str, shape: Sequence[int], config: Config) -> int:
    """The dimensions of a parameter's subspace; 0 where it is stepped by plain AdamW."""
    if len(shape) != 2 or not adamw.in_blocks(name):
        return 0
    return config.rank if isinstance(config.rank, int) else max(1, round(config.rank * min(shape)))


def state_bytes(shapes: Mapping[str, Sequence[int]], config: Config) -> int:
    """Bytes of the moments, 2 r n numbers for a matrix (m, n) with m <= n, and of its
    projection, m r; else 8 a number.
    """
    total = 0
    for name, shape in shapes.items():
        r = rank_of(name, shape, config)
        total += 4 * (2 * r * max(shape) + r * min(shape)) if r else 8 * prod(shape)
    return total


def build(named_parameters: list[tuple[str, Any]], lr: float, config: Config) -> "Optimizer":
    """The optimizer over (name, parameter) pairs, at learning rate `lr`."""
    from finrepro.methods.layers.galore import GaLoreAdamW

    ranks = {name: rank_of(name, p.shape, config) for name, p in named_parameters}
    groups = []
    for rank in sorted(set(ranks.values())):
        members = [(name, p) for name, p in named_parameters if ranks[name] == rank]
        groups += [
            {**group, "rank": rank} for group in adamw.decay_groups(members, config.weight_decay)
        ]
    common = {"update_proj_gap": config.update_proj_gap, "step_scale": config.step_scale}
    return GaLoreAdamW(groups, {"lr": lr, "betas": config.betas, "eps": config.eps, **common})
