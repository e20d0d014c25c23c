"""Law: every example is in an epoch once, every layout keeps its budget and loses nothing, and
ranks only divide the work.
"""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finrepro.data import packing
from finrepro.data.packing import (
    LAYOUTS,
    ExampleIndices,
    bins,
    computed_tokens,
    num_steps,
    padded,
    rank_rows,
    steps_of_epoch,
)

SETTINGS = settings(deadline=None, derandomize=True, max_examples=100)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
BATCH, WINDOW, SEED = st.integers(1, 9), st.integers(1, 5), st.integers(0, 5)


def flat(groups: list[ExampleIndices]) -> list[int]:
    return sorted(row for group in groups for row in group)


@SETTINGS
@given(LENGTHS, BATCH, WINDOW, SEED, st.integers(0, 3))
def test_an_epoch_holds_every_example_exactly_once(
    lengths: list[int], batch: int, window: int, seed: int, epoch: int
):
    steps = steps_of_epoch(lengths, batch, window, seed, epoch)
    assert flat(steps) == list(range(len(lengths)))
    assert all(1 <= len(step) <= batch for step in steps)
    assert len(steps) == num_steps(len(lengths), batch, window)
    if window == 1:
        assert all(len(step) == batch for step in steps[:-1])


@SETTINGS
@given(LENGTHS, BATCH, WINDOW, SEED)
def test_an_epoch_is_decided_by_its_seed_and_number(
    lengths: list[int], batch: int, window: int, seed: int
):
    assert steps_of_epoch(lengths, batch, window, seed, 1) == steps_of_epoch(
        lengths, batch, window, seed, 1
    )


def test_epochs_and_seeds_differ_in_order_and_in_composition():
    lengths = np.random.default_rng(0).integers(5, 60, 500).tolist()
    first, again, other_seed = (
        {frozenset(step) for step in steps_of_epoch(lengths, 8, 4, seed, epoch)}
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    assert len(first & again) < len(first) / 10 and len(first & other_seed) < len(first) / 10


def test_sorting_inside_windows_makes_padding_rare_without_changing_what_is_seen():
    lengths = np.random.default_rng(0).integers(5, 100, 2000).tolist()

    def share(window: int) -> float:
        return sum(lengths) / computed_tokens(
            steps_of_epoch(lengths, 16, window, 0, 0), lengths, "padded"
        )

    assert share(1) < 0.65 < 0.9 < share(32)


def test_the_steps_of_a_sorted_window_do_not_come_in_order_of_length():
    lengths = np.random.default_rng(0).integers(5, 100, 1600).tolist()
    means = [
        np.mean([lengths[row] for row in step]) for step in steps_of_epoch(lengths, 16, 100, 0, 0)
    ]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


@SETTINGS
@given(LENGTHS, st.integers(1, 100), st.sampled_from(sorted(LAYOUTS)))
def test_a_layout_keeps_every_row_once(lengths: list[int], budget: int, layout: str):
    rows = list(range(len(lengths)))
    assert flat(LAYOUTS[layout](rows, lengths, budget)) == rows
    assert LAYOUTS[layout](rows[::-1], lengths, budget) == LAYOUTS[layout](rows, lengths, budget)
    assert LAYOUTS[layout]([], lengths, budget) == []


@SETTINGS
@given(LENGTHS, st.integers(1, 100))
def test_padding_stays_within_the_budget_unless_one_row_alone_is_longer(
    lengths: list[int], budget: int
):
    for batch in padded(list(range(len(lengths))), lengths, budget):
        assert max(lengths[row] for row in batch) * len(batch) <= budget or len(batch) == 1


@SETTINGS
@given(LENGTHS, st.integers(1, 100))
def test_a_bin_stays_within_its_capacity_unless_one_row_alone_is_longer(
    lengths: list[int], capacity: int
):
    for content in bins(list(range(len(lengths))), lengths, capacity):
        assert sum(lengths[row] for row in content) <= capacity or len(content) == 1


def next_fit(lengths: list[int], capacity: int) -> int:
    """Bins of next-fit decreasing, the simplest packing of sorted rows."""
    filled, count = capacity + 1, 0
    for length in sorted(lengths, reverse=True):
        if filled + length > capacity:
            filled, count = 0, count + 1
        filled += length
    return count


def best_fit(lengths: list[int], capacity: int) -> int:
    """Bins of best-fit decreasing, by looking at every bin."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, free in enumerate(room) if free >= length]
        if fits:
            room[min(fits, key=lambda i: room[i])] -= length
        else:
            room.append(max(capacity, length) - length)
    return len(room)


@SETTINGS
@given(LENGTHS, st.integers(1, 100))
def test_best_fit_decreasing_makes_as_many_bins_as_its_definition_and_no_more_than_next_fit(
    lengths: list[int], capacity: int
):
    rows = list(range(len(lengths)))
    plain, packed = packing.best_fit(rows, lengths, capacity), bins(rows, lengths, capacity)
    count = len(packed)
    assert count <= len(plain) == best_fit(lengths, capacity) <= next_fit(lengths, capacity)
    assert count < len(plain) or packed == plain, (
        "another way to fill them is taken only where it saves a bin"
    )
    if max(lengths) <= capacity:
        lower = -(-sum(lengths) // capacity)
        assert lower <= count
        assert count * capacity < 2 * sum(lengths) + capacity, (
            "two bins that are at most half full would be one"
        )


@SETTINGS
@given(LENGTHS, st.integers(1, 100))
def test_bins_closed_by_pairs_keep_every_row_once_and_their_capacity(
    lengths: list[int], capacity: int
):
    rows = list(range(len(lengths)))
    content = packing.closed_by_pairs(rows, lengths, capacity)
    assert flat(content) == rows
    assert all(sum(lengths[row] for row in each) <= capacity or len(each) == 1 for each in content)


def test_bins_are_as_few_as_the_tokens_need_where_best_fit_decreasing_makes_one_more():
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(35, 90, 800).tolist()
        while (
            -sum(lengths) % 2048 > 110
        ):  # as FiQA's training split: hardly a token of room in the fewest bins
            lengths.pop()
        rows, fewest = list(range(len(lengths))), -(-sum(lengths) // 2048)
        assert len(bins(rows, lengths, 2048)) == fewest < len(packing.best_fit(rows, lengths, 2048))


def test_packing_grows_about_linearly_with_the_number_of_rows():
    def seconds(count: int) -> float:
        lengths = np.random.default_rng(0).integers(8, 200, count).tolist()
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            bins(list(range(count)), lengths, 1024)
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds(80_000) < 30 * seconds(
        8_000
    )  # ten times the rows; the square would be a hundred times the work


@SETTINGS
@given(LENGTHS, st.integers(1, 8))
def test_ranks_share_a_step_without_gap_or_overlap(lengths: list[int], world_size: int):
    rows = list(range(len(lengths)))
    shares = [rank_rows(rows, lengths, rank, world_size) for rank in range(world_size)]
    assert flat(shares) == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    work = [sum(lengths[row] for row in share) for share in shares]
    assert max(work) - min(work) <= max(lengths), "ranks get about equal work"


@SETTINGS
@given(LENGTHS, BATCH, WINDOW, SEED, st.randoms(use_true_random=False))
def test_a_ranks_part_depends_on_the_rows_and_not_on_their_order(
    lengths: list[int], batch: int, window: int, seed: int, random
):
    for step in steps_of_epoch(lengths, batch, window, seed, 0):
        shuffled = random.sample(step, len(step))
        assert [rank_rows(step, lengths, r, 3) for r in range(3)] == [
            rank_rows(shuffled, lengths, r, 3) for r in range(3)
        ]


@pytest.mark.parametrize(
    ("batches", "padded_tokens", "real"),
    [([[0, 1]], 20, 15), ([[0], [1]], 15, 15), ([[0, 1, 2]], 30, 25)],
)
def test_computed_tokens_count_padding_and_bins_have_none(
    batches: list[ExampleIndices], padded_tokens: int, real: int
):
    assert computed_tokens(batches, [10, 5, 10], "padded") == padded_tokens
    assert computed_tokens(batches, [10, 5, 10], "bins") == real
