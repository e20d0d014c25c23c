"""Law: an interval holds the true value as often as it says, sources that repeat widen it, and
equal models do not differ.
"""

import numpy as np
import pytest
from scipy import stats

from finrepro.evaluation.metrics import classification_scores
from finrepro.statistics.bootstrap import intervals, paired_differences, resampled_sums

RULE = {"resamples": 1000, "confidence": 0.95, "seed": 0}


def share(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The share of hits from (hits, rows)."""
    return {"share": sums[..., 0] / sums[..., 1]}


def tally(hits: np.ndarray) -> np.ndarray:
    """(hit, 1) of each row."""
    return np.stack([hits, np.ones(len(hits))], axis=1).astype(float)


def confusion(sums: np.ndarray) -> dict[str, np.ndarray]:
    return classification_scores(sums.reshape(*sums.shape[:-1], 3, 4))


def three_way(rng: np.random.Generator, rows: int, skill: float) -> np.ndarray:
    """One-hot (gold, prediction) pairs of a three-way task, answered rightly with probability
    `skill`.
    """
    gold = rng.integers(0, 3, rows)
    answer = np.where(rng.random(rows) < skill, gold, rng.integers(0, 3, rows))
    return np.eye(12)[gold * 4 + answer]


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth, held = 0.7, 0
    for _ in range(400):
        rows = tally(rng.random(150) < truth)
        found = intervals(
            rows, range(150), share, resamples=200, confidence=0.9, seed=int(rng.integers(2**31))
        )
        held += found["share"].low <= truth <= found["share"].high
    assert (
        0.85 <= held / 400 <= 0.95
    )  # 0.9, four standard errors of 400 trials below and above, less discreteness


def test_an_interval_of_a_share_is_that_of_the_binomial_distribution():
    rows = tally(np.arange(500) < 350)
    found = intervals(rows, range(500), share, resamples=4000, confidence=0.95, seed=0)["share"]
    exact = stats.binom(500, 0.7).ppf([0.025, 0.975]) / 500
    assert found.value == 0.7
    assert [found.low, found.high] == pytest.approx(list(exact), abs=0.004)


def test_an_interval_agrees_with_scipys_bootstrap_on_a_metric_of_tables():
    rows = three_way(np.random.default_rng(3), 300, 0.6)
    ours = intervals(rows, range(300), confusion, resamples=3000, confidence=0.95, seed=0)[
        "f1_macro"
    ]

    def f1_macro(index: np.ndarray) -> float:
        return float(confusion(rows[index.astype(int)].sum(0))["f1_macro"])

    theirs = stats.bootstrap(
        (np.arange(300),),
        f1_macro,
        n_resamples=3000,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.01)


def test_more_confidence_and_fewer_rows_widen_an_interval():
    rng = np.random.default_rng(2)
    hits = rng.random(800) < 0.6

    def width(rows: np.ndarray, confidence: float) -> float:
        found = intervals(
            tally(rows), range(len(rows)), share, resamples=1000, confidence=confidence, seed=0
        )["share"]
        return found.high - found.low

    assert width(hits, 0.99) > width(hits, 0.95) > width(hits, 0.5) > 0
    assert width(hits[:200], 0.95) == pytest.approx(2 * width(hits, 0.95), rel=0.2)


def test_rows_that_repeat_a_source_widen_the_interval_as_if_each_source_were_one_row():
    rng = np.random.default_rng(4)
    once = rng.random(120) < 0.6
    tenfold, source = np.repeat(once, 10), np.repeat(np.arange(120), 10)
    clustered = intervals(tally(tenfold), source.tolist(), share, **RULE)["share"]
    alone = intervals(tally(once), range(120), share, **RULE)["share"]
    naive = intervals(tally(tenfold), range(1200), share, **RULE)["share"]
    assert clustered == alone
    # The planted mutant: rows taken for independent make it look about sqrt(10) times as sure.
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(
        np.sqrt(10), rel=0.2
    )


def test_a_model_does_not_differ_from_itself():
    rows = three_way(np.random.default_rng(5), 200, 0.7)
    for name, found in paired_differences(rows, rows, range(200), confusion, **RULE).items():
        assert (found.value, found.low, found.high) == (0, 0, 0), name


def test_a_paired_interval_is_narrower_than_that_of_unrelated_rows_and_antisymmetric():
    rng = np.random.default_rng(6)
    first = rng.random(400) < 0.7
    second = first.copy()
    second[:20] = ~second[:20]  # the models disagree on 20 rows
    forth = paired_differences(tally(first), tally(second), range(400), share, **RULE)["share"]
    back = paired_differences(tally(second), tally(first), range(400), share, **RULE)["share"]
    assert forth.value == pytest.approx(float(first.mean() - second.mean()))
    assert [back.value, back.low, back.high] == pytest.approx(
        [-forth.value, -forth.high, -forth.low]
    )
    unrelated = paired_differences(
        tally(first), tally(rng.permutation(second)), range(400), share, **RULE
    )["share"]
    assert forth.high - forth.low < (unrelated.high - unrelated.low) / 2


def test_a_better_model_is_found_better_and_a_coin_is_not():
    rng = np.random.default_rng(7)
    better, worse = rng.random(1000) < 0.8, rng.random(1000) < 0.7
    assert (
        paired_differences(tally(better), tally(worse), range(1000), share, **RULE)["share"].low > 0
    )
    heads, tails = rng.random(1000) < 0.5, rng.random(1000) < 0.5
    found = paired_differences(tally(heads), tally(tails), range(1000), share, **RULE)["share"]
    assert found.low < 0 < found.high


def test_equal_seeds_give_equal_bits_and_other_seeds_others():
    rows = three_way(np.random.default_rng(8), 300, 0.6)
    one, same, other = (
        intervals(rows, range(300), confusion, resamples=300, confidence=0.95, seed=seed)
        for seed in (0, 0, 1)
    )
    assert one == same
    assert one["accuracy"].value == other["accuracy"].value and one["accuracy"] != other["accuracy"]


def test_every_resample_draws_as_many_sources_as_there_are():
    clusters = ["a", "a", "b", "c", "c", "c"]
    (sums,) = resampled_sums([np.eye(6)], clusters, 50, 0)
    drawn = sums[:, [0, 2, 3]]
    assert np.array_equal(drawn.sum(1), np.full(50, 3.0))
    assert np.array_equal(sums[:, 0], sums[:, 1]) and np.array_equal(sums[:, 3], sums[:, 5])
    assert np.all(sums >= 0) and len(np.unique(drawn, axis=0)) > 1


def test_a_model_that_is_always_right_has_an_interval_without_width():
    found = intervals(tally(np.ones(50)), range(50), share, **RULE)["share"]
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_a_metric_that_is_never_defined_has_no_bounds_and_says_so():
    def undefined(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {"share": np.full(sums.shape[:-1], np.nan)}

    found = intervals(tally(np.ones(5)), range(5), undefined, **RULE)["share"]
    assert np.isnan(found.low) and np.isnan(found.high)


def test_resamples_are_drawn_once_for_test_sets_of_one_size(monkeypatch):
    from finrepro.statistics import bootstrap

    drawn = []
    bootstrap._weights.cache_clear()
    make = np.random.default_rng
    monkeypatch.setattr(
        bootstrap.np.random, "default_rng", lambda seed: drawn.append(seed) or make(seed)
    )
    tally, clusters = np.eye(5), range(5)
    once = resampled_sums([tally], clusters, 40, seed=3)
    again = resampled_sums([tally], clusters, 40, seed=3)
    assert drawn == [3]
    np.testing.assert_array_equal(once[0], again[0])
    direct = make(3).multinomial(5, np.full(5, 1 / 5), size=40)
    np.testing.assert_array_equal(once[0], direct)


def test_a_source_that_is_drawn_more_than_255_times_is_counted_in_full():
    (sums,) = resampled_sums([np.ones((1000, 1))], [0] * 500 + [1] * 500, 50, seed=0)
    np.testing.assert_array_equal(sums, 1000.0)
    (alone,) = resampled_sums([np.ones((300, 1))], [0] * 300, 5, seed=0)
    np.testing.assert_array_equal(alone, 300.0)
