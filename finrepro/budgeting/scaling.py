"""Scaling laws: the loss of N parameters after D tokens, what is best for a number of operations,
and what repeated tokens are worth.

L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., 2022, arXiv 2203.15556, section 3.3), C = 6
N D. No torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from finrepro.catalogue.reader import catalogue, entry
from finrepro.settings import PositiveFloat, build, settings

Read = Literal["paper", "code", "second-hand"]
SMALLEST, LARGEST = 1e5, 1e14  # parameters among which an optimum is looked for


@settings
class Law:
    """One fit. `read`: where its constants were read."""

    name: str
    title: str
    E: PositiveFloat
    A: PositiveFloat
    B: PositiveFloat
    alpha: PositiveFloat
    beta: PositiveFloat
    source: str
    read: Read

    @property
    def balance(self) -> float:
        """G of the optimum: N = G (C / 6)^(beta / (alpha + beta))."""
        return float((self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta)))


@settings
class Repetition:
    """How fast repeated tokens and excess parameters lose their worth: after about so many
    repetitions they are worth nothing more.
    """

    tokens: PositiveFloat
    parameters: PositiveFloat
    source: str
    read: Read


@dataclass(frozen=True)
class Point:
    """A model of `parameters` trained on `tokens`, and the loss to expect (nats a token)."""

    parameters: float
    tokens: float
    loss: float


@cache
def law(name: str) -> Law:
    """A law of configs/scaling.yaml."""
    return build(Law, {"name": name, **entry("scaling", name, "scaling law")}, f"scaling.{name}")


@cache
def laws() -> tuple[Law, ...]:
    """Every law, in the file's order."""
    return tuple(law(name) for name in catalogue("scaling") if name != "repetition")


@cache
def repetition() -> Repetition:
    """The constants of repeated data."""
    return build(Repetition, entry("scaling", "repetition", "setting"), "scaling.repetition")


def effective(first: float, total: float, worth: float) -> float:
    """What `total` are worth of which `first` are different: U + U R* (1 - exp(-R / R*)), R =
    total / U - 1 (arXiv 2305.16264, eq. 5).
    """
    unique = min(first, total)
    return unique + unique * worth * (1 - math.exp(-(total / unique - 1) / worth))


def loss(fit: Law, parameters: float, tokens: float, unique: float | None = None) -> float:
    """The loss to expect. Tokens beyond `unique` ones are repetitions, and excess parameters
    count less too (arXiv 2305.16264, eq. 6).
    """
    if unique is not None:
        worth, different = repetition(), min(unique, tokens)
        needed = different_parameters(fit, different)
        parameters = effective(needed, parameters, worth.parameters)
        tokens = effective(different, tokens, worth.tokens)
    return float(fit.E + fit.A / parameters**fit.alpha + fit.B / tokens**fit.beta)


def different_parameters(fit: Law, tokens: float) -> float:
    """The size for which `tokens` are the optimum: U_N = (U_D G)^(beta / alpha) G (arXiv
    2305.16264, appendix A).
    """
    return float((tokens * fit.balance) ** (fit.beta / fit.alpha) * fit.balance)


def optimum(fit: Law, operations: float, unique: float | None = None) -> Point:
    """The size and tokens of the least loss at `operations` = 6 N D: in closed form, or found
    along that line where tokens repeat.
    """
    line = operations / 6
    if unique is None:
        parameters = fit.balance * line ** (fit.beta / (fit.alpha + fit.beta))
    else:
        parameters = math.exp(
            _least(lambda log: loss(fit, math.exp(log), line / math.exp(log), unique))
        )
    return Point(parameters, line / parameters, loss(fit, parameters, line / parameters, unique))


def _least(height: Callable[[float], float]) -> float:
    """Where a function of log N is least: the best of a grid, then golden sections around it."""
    low, high, steps = math.log(SMALLEST), math.log(LARGEST), 400
    grid = [low + (high - low) * step / steps for step in range(steps + 1)]
    best = min(grid, key=height)
    low, high, golden = (
        best - (high - low) / steps,
        best + (high - low) / steps,
        (math.sqrt(5) - 1) / 2,
    )
    while high - low > 1e-9:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if height(left) < height(right):
            high = right
        else:
            low = left
    return (low + high) / 2
