"""Whether a published value is reproduced: a verdict from our value, its interval, and a margin
fixed beforehand.

The verdicts are IDENTICAL (same bits), NUMERIC (losses within a band), EQUIVALENT, CLAIM HOLDS (an
order or a sign), DIFFERS, INCONCLUSIVE, NOT RUN. The first two belong to replays, the fourth to
paired differences; the others compare one value of ours with one published number. Overlapping
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
FEW_SEEDS = 3  # with fewer the verdict is marked: the spread between runs is hardly known


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
    """A verdict, and its text: difference, margin, and what would decide an open one."""

    verdict: Verdict
    text: str


def half_width(share: float, n: int) -> float:
    """95 % sampling half-width of a share of n independent examples (normal approximation of the
    binomial).
    """
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(share * (1 - share) / n)


def student_half_width(values: Sequence[float]) -> float:
    """95 % half-width of the mean of at least two independent values: Student's t."""
    from scipy.special import stdtrit  # scipy.stats.t.ppf, whose import takes four times as long

    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return quantile * stdev(values) / math.sqrt(len(values))


def estimate(
    values: Sequence[float], lows: Sequence[float], highs: Sequence[float], n: int
) -> Estimate:
    """Runs that differ in their seed alone, as one estimate; its interval covers both sources of
    variance.

    Examples: the mean of the runs' bounds, since they share the test set. Runs: Student's t over
    their values, unknown for a single one. The two are independent, so that their half-widths add
    in squares.
    """
    value, runs = mean(values), len(values)
    spread = student_half_width(values) if runs > 1 else 0.0
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
    difference = f"{ours.value - published:+.3f}, margin {margin:.3f}{few}"
    if published - margin <= ours.low and ours.high <= published + margin:
        return Judgement("EQUIVALENT", difference)
    if ours.low > published + margin or ours.high < published - margin:
        return Judgement("DIFFERS", difference)
    return Judgement("INCONCLUSIVE", f"{difference}; {_undecided(ours, published, margin)}")


def _undecided(ours: Estimate, published: float, margin: float) -> str:
    """What would decide, if our value stayed the same: more seeds, or so many test examples."""
    room = abs(abs(ours.value - published) - margin)
    half = max(ours.value - ours.low, ours.high - ours.value)
    sampling = math.sqrt(max(half**2 - ours.spread**2, 0.0))
    if ours.spread >= room:
        return "needs more seeds" if ours.spread > 0 else "lies on the margin"
    examples = math.ceil(ours.n * sampling**2 / (room**2 - ours.spread**2))
    return f"needs about {examples:,} test examples"
