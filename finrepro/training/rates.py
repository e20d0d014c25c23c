"""Learning rates that a method changes: over the steps, or within a model, where the groups of any
optimizer are split so that each has one factor to the schedule's rate.

A factor is kept in its group as `lr_scale`, so that engines and checkpoints carry it along with the
group's other settings.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from finrepro.settings import Choice


def scale_of(adapter: Choice) -> Callable[[str], float]:
    """A parameter's name -> the factor to its learning rate: the adapter's `lr_scale(name,
    config)`, 1 where it has none.
    """
    own = getattr(adapter.module("adapters"), "lr_scale", None)
    return partial(own, config=adapter.config) if own else lambda _: 1.0


def factor_of(adapter: Choice, max_steps: int) -> Callable[[int], float]:
    """A step -> the factor to the schedule's rate: the adapter's `lr_factor(step, config,
    max_steps)`, 1 where it has none.
    """
    own = getattr(adapter.module("adapters"), "lr_factor", None)
    return partial(own, config=adapter.config, max_steps=max_steps) if own else lambda _: 1.0


def split(optimizer: Any, named: Iterable[tuple[str, Any]], scale: Callable[[str], float]) -> None:
    """Split the groups of a new optimizer over (name, parameter) pairs, in place; their other
    settings are kept.
    """
    factors = {id(parameter): scale(name) for name, parameter in named}
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
