"""Learning rates that a method changes: over the steps, or within a model, where the groups of any
optimizer are split so that each has one factor to the schedule's rate.

A factor is kept in its group as `lr_scale`, so that engines and checkpoints carry it along with the
group's other settings.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def split_groups(
    optimizer: Any, named_parameters: Iterable[tuple[str, Any]], scale: Callable[[str], float]
) -> None:
    """Split the groups of a new optimizer over (name, parameter) pairs, in place, so that each has
    one factor; their other settings are unchanged.
    """
    factors = {id(parameter): scale(name) for name, parameter in named_parameters}
    groups = []
    for group in optimizer.param_groups:
        for factor in sorted({factors[id(parameter)] for parameter in group["params"]}):
            members = [
                parameter for parameter in group["params"] if factors[id(parameter)] == factor
            ]
            groups.append(
                {**group, "params": members, "lr": group["lr"] * factor, "lr_scale": factor}
            )
    optimizer.param_groups[:] = groups


def set_rate(groups: Sequence[dict[str, Any]], rate: float) -> None:
    """Set every group's learning rate to the schedule's, times its factor."""
    for group in groups:
        group["lr"] = rate * group["lr_scale"]
