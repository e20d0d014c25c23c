"""Intervals and paired differences by bootstrap over examples, clustered where examples share a
source.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Integer

Score = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Interval:
    """A value with its percentile bootstrap interval."""

    value: float
    low: float
    high: float


def resampled_sums(
    tallies: Sequence[Float[np.ndarray, "rows _"]],
    clusters: Sequence[Hashable],
    resamples: int,
    seed: int,
) -> list[Float[np.ndarray, "resamples _"]]:
    """Column sums of each tally under the same resamples of clusters with replacement, so that they
    can be compared pairwise.

    Every metric here is a function of such sums, which makes a thousand resamples one matrix
    product (Efron, 1979; the cluster bootstrap of Cameron, Gelbach and Miller, 2008, section II).
    """
    codes = {key: position for position, key in enumerate(dict.fromkeys(clusters))}
    member = np.array([codes[key] for key in clusters])
    count = len(codes)
    weights = _weights(count, resamples, seed).astype(float)
    per_cluster = []
    for tally in tallies:
        summed = np.zeros((count, tally.shape[1]))
        np.add.at(summed, member, tally)
        per_cluster.append(weights @ summed)
    return per_cluster


@lru_cache(maxsize=4)
def _weights(count: int, resamples: int, seed: int) -> Integer[np.ndarray, "resamples clusters"]:
    """How often each resample draws each cluster. Drawn once a process for test sets of one size,
    and kept in the smallest type that holds it: 2 MB for a thousand resamples of TFNS."""
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    smallest = weights.astype(np.min_scalar_type(int(weights.max(initial=0))))
    smallest.flags.writeable = False
    return smallest


def _interval(value: float, samples: np.ndarray, confidence: float) -> Interval:
    """Percentile interval; resamples in which the metric is undefined are left out."""
    samples = samples[np.isfinite(samples)]
    if len(samples) == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def intervals(
    tally: Float[np.ndarray, "rows columns"],
    clusters: Sequence[Hashable],
    score: Score,
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Interval]:
    """Each metric of `score` on the rows, with its interval."""
    values = score(tally.sum(0))
    (sums,) = resampled_sums([tally], clusters, resamples, seed)
    samples = score(sums)
    return {
        name: _interval(float(value), samples[name], confidence) for name, value in values.items()
    }


def paired_differences(
    first: Float[np.ndarray, "rows columns"],
    second: Float[np.ndarray, "rows columns"],
    clusters: Sequence[Hashable],
    score: Score,
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Interval]:
    """Each metric's difference first - second on the same rows, resampled together."""
    one, two = score(first.sum(0)), score(second.sum(0))
    sums = resampled_sums([first, second], clusters, resamples, seed)
    samples = [score(sums_of_sample) for sums_of_sample in sums]
    return {
        name: _interval(
            float(one[name] - two[name]), samples[0][name] - samples[1][name], confidence
        )
        for name in one
    }
