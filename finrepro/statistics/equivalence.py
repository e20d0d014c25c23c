"""Did a published value reproduce? The rungs that are decided from a value, its interval, and a
margin fixed beforehand.

The ladder is IDENTICAL (same bits), NUMERIC (losses within a band), EQUIVALENT, CLAIM HOLDS (an
order or a sign), DIFFERS, INCONCLUSIVE, NOT RUN. The first two belong to replays and the fourth to
paired differences; what is set against one published number gets one of the others. Overlapping
intervals prove nothing, and neither does p > 0.05: equality is shown by two one-sided tests
(Schuirmann, 1987), that is by an interval that lies inside the margin as a whole, and difference by
one that lies outside as a whole.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev
from typing import Literal

Verdict = Literal["EQUIVALENT", "DIFFERS", "INCONCLUSIVE", "NOT RUN"]
CONFIDENCE = 0.95
FEW_SEEDS = (
    3  # with fewer the verdict is marked: the spread between runs is unknown or hardly known
)


@dataclass(frozen=True)
class Estimate:
    """A metric with its interval: `n` examples, `seeds` runs, `spread` the half-width that comes
    from the runs alone.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: int
    spread: float = 0.0


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the sentence that says how far it reaches."""

    verdict: Verdict
    text: str


def half_width(share: float, n: int) -> float:
    """95 % sampling half-width of a share of n independent examples (normal approximation of the
    binomial).
    """
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(share * (1 - share) / n)


def student_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t for 0.5 < p < 1, by bisection of its closed form (Abramowitz and
    Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + _inside(middle, degrees)) / 2 < p else (low, middle)
    return low


def _inside(t: float, degrees: int) -> float:
    """P(|T| < t) for whole degrees of freedom."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    odd = degrees % 2
    if odd:
        term = cosine
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def estimate(
    values: Sequence[float], lows: Sequence[float], highs: Sequence[float], n: int
) -> Estimate:
    """Runs that differ in their seed alone, as one estimate; its interval covers both sources of
    chance.

    Examples: the runs' mean bounds, for they share the test set. Runs: Student's t over their
    values, unknown for a single one. The two are independent, so their half-widths add in squares.
    """
    value, runs = mean(values), len(values)
    spread = (
        student_quantile((1 + CONFIDENCE) / 2, runs - 1) * stdev(values) / math.sqrt(runs)
        if runs > 1
        else 0.0
    )
    below, above = math.hypot(value - mean(lows), spread), math.hypot(mean(highs) - value, spread)
    return Estimate(value, value - below, value + above, n, runs, spread)


def judge(ours: Estimate | None, published: float, margin: float) -> Judgement:
    """EQUIVALENT when the whole interval lies within `margin` of the published value, DIFFERS when
    it lies outside, else INCONCLUSIVE.

    `margin` is in the metric's unit and must have been fixed before the run. Raises `ValueError`
    for a margin that is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"a margin is above 0, not {margin}")
    if ours is None:
        return Judgement("NOT RUN", "no result here")
    few = "" if ours.seeds >= FEW_SEEDS else f", {ours.seeds} seed{'s' * (ours.seeds > 1)} only"
    about = f"{ours.value - published:+.3f}, margin {margin:.3f}{few}"
    if published - margin <= ours.low and ours.high <= published + margin:
        return Judgement("EQUIVALENT", about)
    if ours.low > published + margin or ours.high < published - margin:
        return Judgement("DIFFERS", about)
    return Judgement("INCONCLUSIVE", f"{about}; {_needed(ours, published, margin)}")


def _needed(ours: Estimate, published: float, margin: float) -> str:
    """What would decide, if the value stayed where it is."""
    room = abs(abs(ours.value - published) - margin)
    half = max(ours.value - ours.low, ours.high - ours.value)
    sampling = math.sqrt(max(half**2 - ours.spread**2, 0.0))
    if ours.spread >= room:
        return "needs more seeds" if ours.spread > 0 else "lies on the margin"
    return f"needs about {math.ceil(ours.n * sampling**2 / (room**2 - ours.spread**2)):,} test examples"
