"""Law C2 and C5 for running text: windows lose and leak nothing, and the order of training is a
function of the step alone.

Packed windows give the loss and gradients of the documents' pieces one by one; T tokens in D
documents have T - D supervised ones; the stream of samples is the same for any number of ranks and
after any number of kills.
"""

import dataclasses
import hashlib
import itertools
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.corpora import START, random_documents, stream_of, write_corpus
from fixtures.model import (
    MINIATURES,
    all_logits,
    assert_same_gradients,
    broken,
    gradients,
    process,  # noqa: F401
    stirred,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finrepro import PROJECT
from finrepro.data import packing
from finrepro.data.batches import Batch, end_to_end, side_by_side
from finrepro.data.corpora import order
from finrepro.data.corpora.mixture import Mixture
from finrepro.data.corpora.stream import open_corpus
from finrepro.data.corpora.windows import Lengths, Window, Windows
from finrepro.data.tokens import IGNORE, Encoded
from finrepro.errors import UsageError
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.training import steps as steps_training

everywhere = pytest.mark.parametrize("name", MINIATURES)


# Every token once.


def pairs_of(documents: Sequence[Sequence[int]]) -> Counter[tuple[int, int]]:
    """(token read, token to predict): all that there is to learn."""
    return Counter(pair for document in documents for pair in itertools.pairwise(document))


def pairs_learned(windows: Sequence[Window]) -> Counter[tuple[int, int]]:
    actual: Counter[tuple[int, int]] = Counter()
    for window in windows:
        for piece in window.pieces:
            learned = [
                (int(a), int(b))
                for a, b in zip(piece.ids, piece.targets(), strict=True)
                if b != IGNORE
            ]
            assert len(learned) == piece.num_supervised
            actual.update(learned)
    return actual


def every_token_is_supervised_once(
    documents: Sequence[Sequence[int]], windows: Sequence[Window]
) -> None:
    assert pairs_learned(windows) == pairs_of(documents)
    tokens = sum(map(len, documents))
    assert sum(window.num_supervised for window in windows) == tokens - len(documents)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    length=st.integers(2, 50),
    capacity=st.integers(2, 60),
)
def test_every_token_is_supervised_once_but_each_documents_first(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, length: int, capacity: int
) -> None:
    documents = random_documents(seed, count)
    windows = Windows(
        stream_of(tmp_path_factory.mktemp("c") / "corpus", documents, capacity), length
    )
    every_token_is_supervised_once(documents, windows)
    assert windows.num_supervised == sum(map(len, documents)) - count
    assert list(windows.lengths) == [len(window.ids) for window in windows]
    assert set(windows.lengths[:-1]) <= {length} and 1 <= windows.lengths[-1] <= length
    assert all(window.num_supervised >= 1 for window in windows), (
        "a step of one window needs something to learn"
    )
    for window in windows:
        assert [len(piece.ids) for piece in window.pieces] and sum(
            len(p.ids) for p in window.pieces
        ) == len(window.ids)
        assert window.piece_lengths == tuple(len(piece.ids) for piece in window.pieces)
        assert all(START not in piece.ids[1:] for piece in window.pieces), (
            "a piece is of one document"
        )
        assert sum(piece.num_supervised for piece in window.pieces) == window.num_supervised
        assert (
            np.concatenate([piece.targets() for piece in window.pieces]).tolist()
            == window.targets().tolist()
        )


def test_windows_that_lose_a_token_at_their_border_or_learn_across_documents_are_found(
    tmp_path: Path,
) -> None:
    documents = random_documents(0, 9)
    windows = list(Windows(stream_of(tmp_path / "c", documents), 16))
    every_token_is_supervised_once(documents, windows)
    plain_pieces = [
        Encoded(tuple(map(int, window.ids)), 1) for window in windows
    ]  # no successor, no cuts
    broken(every_token_is_supervised_once, documents, plain_pieces)
    broken(
        every_token_is_supervised_once,
        documents,
        [dataclasses.replace(each, cuts=()) for each in windows],
    )
    broken(every_token_is_supervised_once, documents, windows[:-1])


# Packing is exact.


def piece_by_piece(model: nn.Module, windows: Sequence[Window]) -> tuple[float, dict[str, Tensor]]:
    """From the definition: every piece alone through the whole model, token t + 1 from the
    logits at t.
    """
    total = 0.0
    for piece in (piece for window in windows for piece in window.pieces):
        ids = [int(each) for each in piece.ids]
        expected = ids[1:] if piece.successor is None else [*ids[1:], piece.successor]
        if expected:
            logprobs = all_logits(model, ids).log_softmax(-1)
            loss = -logprobs[torch.arange(len(expected)), torch.tensor(expected)].sum()
            loss.backward()
            total += float(loss.detach())
    return total, gradients(model)


def packing_is_exact(model: nn.Module, windows: Sequence[Window], batches: Sequence[Batch]) -> None:
    """The mean loss to 1e-6, every gradient to 1e-5 relative, in fp32."""
    supervised = sum(window.num_supervised for window in windows)
    total = 0.0
    for batch in batches:
        loss = SupervisedLM(model)(batch)
        loss.backward()
        total += float(loss.detach())
    slopes = gradients(model)
    expected, expected_slopes = piece_by_piece(model, windows)
    assert abs(total - expected) / supervised <= 1e-6, (total, expected)
    assert_same_gradients(slopes, expected_slopes, 1e-5)


@everywhere
@pytest.mark.parametrize(("seed", "length", "longest"), [(0, 24, 40), (1, 16, 8), (2, 17, 60)])
def test_packed_windows_equal_their_pieces_one_by_one(
    name: str, seed: int, length: int, longest: int, tmp_path: Path
) -> None:
    windows = list(Windows(stream_of(tmp_path / "c", random_documents(seed, 6, longest)), length))
    packing_is_exact(stirred(name), windows, [end_to_end(windows[:1]), end_to_end(windows[1:])])


def leaking(batch: Batch) -> Batch:
    return dataclasses.replace(batch, segment_lengths=(batch.input_ids.shape[1],))


def counted_on(batch: Batch) -> Batch:
    return dataclasses.replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])


@everywhere
@pytest.mark.parametrize("mutant", [leaking, counted_on])
def test_a_window_whose_documents_see_one_another_or_are_counted_on_is_found(
    name: str, mutant: Callable[[Batch], Batch], tmp_path: Path
) -> None:
    windows = list(Windows(stream_of(tmp_path / "c", random_documents(3, 6)), 24))
    packing_is_exact(stirred(name), windows, [end_to_end(windows)])
    # Rotary positions are relative: counting on is no fault for a Llama whose documents are kept
    # apart.
    mutated = [mutant(end_to_end(windows))]
    if mutant is counted_on and name.startswith("llama"):
        packing_is_exact(stirred(name), windows, mutated)
    else:
        broken(packing_is_exact, stirred(name), windows, mutated)


def test_the_padded_layout_refuses_a_window_of_several_documents(tmp_path: Path) -> None:
    windows = Windows(stream_of(tmp_path / "c", [[0, 1, 2], [0, 3, 4, 5]]), 7)
    with pytest.raises(UsageError, match="need the layout 'bins'"):
        side_by_side([windows[0]])
    alone = Windows(stream_of(tmp_path / "d", [[0, 1, 2], [0, 3, 4, 5]]), 3)
    assert [len(alone[row].pieces) for row in range(2)] == [1, 1]
    batch = side_by_side([alone[0], alone[1]])
    assert batch.input_ids.tolist() == [[0, 1, 2], [0, 3, 4]]
    assert batch.targets.tolist() == [1, 2, 3, 4, 5] and batch.positions.tolist() == [0, 1, 3, 4, 5]


def test_windows_say_what_they_cannot_be_made_of(tmp_path: Path) -> None:
    stream = stream_of(tmp_path / "c", [[0, 1, 2]])
    with pytest.raises(UsageError, match="at least 2"):
        Windows(stream, 1)
    windows = Windows(stream, 8)
    assert len(windows) == 1 and len(windows[0].ids) == len(windows[-1].ids) == 2
    for row in (1, -2):
        with pytest.raises(IndexError):
            windows[row]
    assert [len(each.ids) for each in windows[:]] == [2] and Lengths(3, 8, 5)[1:] == [8, 5]


# The order.


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_the_order_of_an_epoch_is_a_permutation_and_any_part_of_it_the_same(count: int) -> None:
    all_positions = order.permute(np.arange(count), count, (7, 0, 0))
    assert sorted(all_positions.tolist()) == list(range(count))
    some = np.random.default_rng(0).integers(0, count, 20)
    assert order.permute(some, count, (7, 0, 0)).tolist() == all_positions[some].tolist()
    if count >= 16:
        for key in ((8, 0, 0), (7, 1, 0), (7, 0, 1)):
            other_order = order.permute(np.arange(count), count, key)
            assert float(np.mean(other_order == all_positions)) < 0.5, (
                "another seed, corpus or epoch is another order"
            )


def test_the_order_looks_random_where_positions_go_and_how_neighbours_lie() -> None:
    count = 4096
    places = order.permute(np.arange(count), count, (0, 0, 0))
    assert abs(np.corrcoef(np.arange(count), places)[0, 1]) < 0.05
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    # From 400 keys, where position 3 of 10 goes: chi-square with 9 degrees of freedom, 27.9 is its
    # 0.1 % point.
    hits = Counter(int(order.permute(np.array([3]), 10, (key,))[0]) for key in range(400))
    assert sum((hits[k] - 40) ** 2 / 40 for k in range(10)) < 27.9


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    """A change here changes every pretraining run: known values, computed once."""
    assert order.permute(np.arange(10), 10, (0, 0, 0)).tolist() == [6, 8, 5, 1, 9, 4, 7, 0, 2, 3]


def test_steps_go_through_epochs_each_window_once_in_each(tmp_path: Path) -> None:
    windows = Windows(stream_of(tmp_path / "c", random_documents(0, 30)), 10)
    count = len(windows)
    drawn = [row for step in range(2 * count) for row in windows.rows(step, 3, 5)]
    epochs = [drawn[k * count : (k + 1) * count] for k in range(6)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert windows.rows(10**12, 4, 5) == windows.rows(10**12, 4, 5), (
        "any step, without those before it"
    )


# One stream for any number of ranks, and after kills.


def samples(
    data: Sequence[Window], steps: int, world_size: int, rows: Callable[[int, int, int], list[int]]
) -> str:
    """sha256 of what is learned from, step after step: each rank's windows as it lays them out,
    put back in a step's order.
    """
    seen = hashlib.sha256()
    for step in range(steps):
        expected = rows(step, 8, 3)
        parts = [
            packing.rank_rows(expected, data.lengths, rank, world_size)
            for rank in range(world_size)
        ]  # type: ignore[attr-defined]
        assert Counter(row for part in parts for row in part) == Counter(expected)
        by_row = {row: data[row] for part in parts for row in part}
        for row in expected:
            seen.update(by_row[row].ids.tobytes() + repr(by_row[row].cuts).encode())
    return seen.hexdigest()


def the_stream_is_the_same_for_any_number_of_ranks(
    data: Sequence[Window], rows: Callable[[int, int, int, int], list[int]]
) -> None:
    actual = {
        samples(
            data, 8, world_size, lambda step, size, seed, w=world_size: rows(step, size, seed, w)
        )
        for world_size in (1, 2, 4, 8)
    }
    assert len(actual) == 1


def test_the_samples_are_the_same_for_one_two_four_and_eight_ranks(tmp_path: Path) -> None:
    windows = Windows(stream_of(tmp_path / "c", random_documents(0, 40)), 10)
    the_stream_is_the_same_for_any_number_of_ranks(
        windows, lambda step, size, seed, _: windows.rows(step, size, seed)
    )
    mixture = Mixture({"a": windows, "b": windows}, {"a": 1, "b": 2})
    the_stream_is_the_same_for_any_number_of_ranks(
        mixture, lambda step, size, seed, _: mixture.rows(step, size, seed)
    )
    broken(
        the_stream_is_the_same_for_any_number_of_ranks,
        windows,
        lambda step, size, seed, world_size: windows.rows(step, size, seed + world_size),
    )


PROGRAM = """
import hashlib, pathlib, sys
from finrepro.data.corpora.stream import open_corpus
from finrepro.data.corpora.windows import Windows
folder, log = map(pathlib.Path, sys.argv[1:])
windows = Windows(open_corpus(folder).stream(), 16)
for step in range(log.read_text().count("\\n") if log.exists() else 0, 40):
    ids = b"".join(windows[row].ids.tobytes() for row in windows.rows(step, 8, 3))
    with log.open("a") as file:
        file.write(hashlib.sha256(ids).hexdigest() + "\\n")
    print(step, flush=True)
    sys.stdin.readline()  # the next step begins when it is told to
"""


def test_the_samples_are_the_same_after_three_kills(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "c", {"train": random_documents(0, 40)})
    log = tmp_path / "log"
    for until in (5, 6, 23, 40):  # killed after so many steps, three times; then to the end
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), str(log)],
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert program.stdout is not None and program.stdin is not None
        while (line := program.stdout.readline()) and int(line) < until - 1:
            program.stdin.write("\n")
            program.stdin.flush()
        program.send_signal(signal.SIGKILL)
        program.communicate()
    windows = Windows(open_corpus(folder).stream(), 16)
    expected = [
        b"".join(windows[row].ids.tobytes() for row in windows.rows(step, 8, 3))
        for step in range(40)
    ]
    assert log.read_text().split() == [hashlib.sha256(each).hexdigest() for each in expected]


# Mixtures.


def test_a_mixture_keeps_its_proportions_at_every_moment_and_knows_any_step(tmp_path: Path) -> None:
    parts = {
        name: Windows(stream_of(tmp_path / name, random_documents(seed, 20)), 10)
        for seed, name in enumerate("abc")
    }
    mixture = Mixture(parts, {"a": 0.5, "b": 0.3, "c": 0.2})
    counts = Counter[int]()
    for position in range(3000):
        part, before = mixture.drawn(position)
        assert before == counts[part], "each corpus is gone through without gap or repetition"
        counts[part] += 1
        for each, share in enumerate((0.5, 0.3, 0.2)):
            assert abs(counts[each] - (position + 1) * share) < 3
    assert counts == {0: 1500, 1: 900, 2: 600}
    rows = [row for step in range(375) for row in mixture.rows(step, 8, 1)]
    inside = [mixture.locate(row) for row in rows]
    assert Counter(id(windows) for windows, _ in inside) == {
        id(part): n for part, n in zip(parts.values(), (1500, 900, 600), strict=True)
    }
    for part in parts.values():
        drawn = [row for windows, row in inside if windows is part]
        for begin in range(0, len(drawn) - len(part), len(part)):
            assert sorted(drawn[begin : begin + len(part)]) == list(range(len(part))), (
                "each epoch of each corpus is whole"
            )
    assert [len(mixture[row].ids) for row in range(len(mixture))] == list(mixture.lengths)
    assert len(mixture) == sum(map(len, parts.values())) == len(mixture[:])


@pytest.mark.parametrize(
    "weights", [{}, {"a": 1}, {"a": 0, "b": 1}, {"a": -1, "b": 1}, {"a": float("nan"), "b": 1}]
)
def test_a_mixture_needs_a_positive_weight_for_each_corpus(
    weights: dict[str, float], tmp_path: Path
) -> None:
    windows = Windows(stream_of(tmp_path / "c", [[0, 1, 2]]), 4)
    with pytest.raises(UsageError, match="mixture"):
        Mixture({"a": windows, "b": windows}, weights)


# The loop.


def test_the_loop_takes_the_order_of_the_data_where_it_has_one(tmp_path: Path) -> None:
    windows = Windows(stream_of(tmp_path / "c", random_documents(0, 30)), 10)
    settings = type("Settings", (), {"max_steps": 7, "global_batch_size": 4})()
    steps = (
        steps_training.steps_from.__wrapped__
        if hasattr(steps_training.steps_from, "__wrapped__")
        else steps_training.steps_from
    )
    actual = list(steps(2, windows.lengths, settings, 9, windows.rows))
    assert actual == [(step, windows.rows(step, 4, 9)) for step in range(2, 7)]
