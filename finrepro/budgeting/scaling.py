"""Scaling laws: the loss of N parameters after D tokens, the optimum for a number of FLOPs, and
what repeated tokens are worth. No torch.

L(N, D) = E + A / N^alpha + B / D^beta with C = 6 N D (Hoffmann et al., 2022, arXiv 2203.15556,
section 3.3).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from finrepro.catalogue.reader import entries, entry
from finrepro.settings import PositiveFloat, build, settings

Read = Literal["paper", "code", "second-hand"]
SMALLEST, LARGEST, GRID = 1e5, 1e14, 400  # parameters among which an optimum is looked for; steps


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
    """R*, how fast repeated tokens and excess parameters lose their worth: after about so many
    repetitions another one is worth nothing.
    """

    tokens: PositiveFloat
    parameters: PositiveFloat
    source: str
    read: Read


@dataclass(frozen=True)
class Optimum:
    """The size and tokens of the least loss, and that loss (nats a token)."""

    parameters: float
    tokens: float
    loss: float


@cache
def law(name: str) -> Law:
    """A law of configs/scaling.yaml. Raises `UsageError` for an unknown one."""
    return build(Law, {"name": name, **entry("scaling", name, "scaling law")}, f"scaling.{name}")


@cache
def laws() -> tuple[Law, ...]:
    """Every law, in the file's order."""
    return tuple(law(name) for name in entries("scaling") if name != "repetition")


@cache
def repetition() -> Repetition:
    """The constants of repeated data."""
    return build(Repetition, entry("scaling", "repetition", "setting"), "scaling.repetition")


def effective(unique: float, total: float, decay: float) -> float:
    """What `total` tokens (or parameters) are worth of which `unique` are different: U + U R* (1 -
    exp(-R / R*)), R = total / U - 1, R* = `decay` (arXiv 2305.16264, eq. 5).
    """
    unique = min(unique, total)
    return unique + unique * decay * (1 - math.exp(-(total / unique - 1) / decay))


def loss(law: Law, parameters: float, tokens: float, unique: float | None = None) -> float:
    """The loss to expect, in nats a token. Tokens beyond `unique` ones are repetitions, and excess
    parameters count less too (arXiv 2305.16264, eq. 6).
    """
    if unique is not None:
        decay, different = repetition(), min(unique, tokens)
        parameters = effective(different_parameters(law, different), parameters, decay.parameters)
        tokens = effective(different, tokens, decay.tokens)
    return float(law.E + law.A / parameters**law.alpha + law.B / tokens**law.beta)


def different_parameters(law: Law, tokens: float) -> float:
    """The size for which `tokens` are the optimum: U_N = (U_D G)^(beta / alpha) G (arXiv
    2305.16264, appendix A).
    """
    return float((tokens * law.balance) ** (law.beta / law.alpha) * law.balance)


def optimum(law: Law, compute: float, unique: float | None = None) -> Optimum:
    """The size and tokens of the least loss at `compute` = 6 N D FLOPs: in closed form, or found
    along that line where tokens beyond `unique` ones are repeated.
    """
    product = compute / 6
    if unique is None:
        parameters = law.balance * product ** (law.beta / (law.alpha + law.beta))
    else:
        parameters = _least(lambda size: loss(law, size, product / size, unique))
    return Optimum(
        parameters, product / parameters, loss(law, parameters, product / parameters, unique)
    )


def _least(height: Callable[[float], float]) -> float:
    """The size at which `height` is least: the best of a grid in log N, since repetition bends the
    curve more than once, then Brent's method between its neighbours.

    Where so much is repeated that more of it changes no digit of the loss, any size of that
    plateau may be returned.
    """
    from scipy.optimize import minimize_scalar  # a second of imports that closed forms do without

    low, high = math.log(SMALLEST), math.log(LARGEST)
    width = (high - low) / GRID
    best = min((low + width * step for step in range(GRID + 1)), key=lambda x: height(math.exp(x)))
    minimum = minimize_scalar(
        lambda x: height(math.exp(x)),
        bounds=(best - width, best + width),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return math.exp(minimum.x)
