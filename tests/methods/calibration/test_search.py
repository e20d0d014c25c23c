"""The search by crossings, held against the search over all candidates that it replaced: the same
tau to the last bit, whatever the weights. That search stands here as it was."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import broken
from torch import Tensor

from finrepro.catalogue import reader
from finrepro.methods.calibration import crossings, objectives, search, stored_codes
from finrepro.methods.calibration.search import SIGMA, Candidates
from finrepro.methods.quantizers import bnb_4bit, icq

BLOCK = 64
ENTRY = Candidates(100, 0.1, "nf4", "entropy", True, "smallest")
LEVELS = (-1, -0.7, -0.5, -0.39, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72)


def search_over_all(blocks: Tensor, candidates: Candidates) -> Tensor:
    """Every candidate of every block: sort, place 15 bounds, sum over 16 levels, take the best."""
    half = candidates.range_factor * SIGMA
    factors = [half * step / candidates.n for step in range(-candidates.n, candidates.n + 1)]
    ordered = blocks.sort(1).values
    median = ordered[:, (blocks.shape[1] - 1) // 2, None]
    ordered = ordered - median
    largest = torch.maximum(ordered[:, -1:], -ordered[:, :1])
    steps = torch.tensor(factors) * largest
    tau = steps + median
    if candidates.fallback:
        steps, tau = torch.cat([-median, steps], 1), torch.cat([torch.zeros_like(median), tau], 1)
    scores = score_of_all(ordered, steps, candidates)
    best = scores == scores.amax(1, keepdim=True)
    order = tau.abs() if candidates.tie_break == "smallest" else torch.zeros_like(tau)
    winner = order.masked_fill(~best, math.inf).argmin(1, keepdim=True)
    return tau.gather(1, winner).squeeze(1)


def score_of_all(ordered: Tensor, steps: Tensor, candidates: Candidates) -> Tensor:
    size = ordered.shape[1]
    levels = objectives.sorted_levels(candidates.quant_type, ordered.device)
    middles = (levels[1:] + levels[:-1]) / 2
    scales = torch.maximum(ordered[:, -1:] - steps, steps - ordered[:, :1])
    table = objectives.count_logs(size, ordered.device)
    entropy = candidates.objective == "entropy"
    below = torch.zeros(steps.shape, dtype=torch.int64)
    total = torch.zeros(steps.shape, dtype=torch.int64 if entropy else torch.float64)
    ones = torch.ones(size, size, dtype=torch.float64)
    sums = torch.nn.functional.pad(ordered.double() @ ones.triu(), (1, 0))
    sum_below = sums[:, :1]
    for index, level in enumerate(levels):
        last = index == len(middles)
        bounds = torch.full_like(steps, math.inf) if last else scales * middles[index] + steps
        upto = torch.searchsorted(ordered, bounds)
        count = upto - below
        if entropy:
            total -= table[count]
        else:
            value, sum_upto = (scales * level + steps).double(), sums.gather(1, upto)
            total += value * (2 * (sum_upto - sum_below) - count * value)
            sum_below = sum_upto
        below = upto
    return total


WEIGHTS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Any]] = {
    "normal": lambda draw, shape: draw.standard_normal(shape),
    "small": lambda draw, shape: draw.standard_normal(shape) * 1e-25,
    "far from zero": lambda draw, shape: draw.standard_normal(shape) * 0.01 + 3,
    "as far as float32 goes": lambda draw, shape: draw.standard_normal(shape) * 1e-5 + 3,
    "heavy tails": lambda draw, shape: draw.standard_t(2, size=shape),
    "subnormal": lambda draw, shape: draw.standard_normal(shape) * 1e-39,
    "huge": lambda draw, shape: draw.standard_normal(shape) * 3e37,
    "any scale": lambda draw, shape: (
        draw.standard_normal(shape) * 10.0 ** draw.integers(-44, 38, (shape[0], 1))
    ),
    "constant": lambda draw, shape: np.repeat(draw.standard_normal((shape[0], 1)), shape[1], 1),
    "zero": lambda _, shape: np.zeros(shape),
    "an outlier": lambda draw, shape: np.where(
        np.arange(shape[1]) == 7, 5, draw.standard_normal(shape) * 0.02
    ),
    "few values": lambda draw, shape: draw.integers(-3, 4, shape),
    "the levels": lambda draw, shape: draw.choice((*LEVELS, 1), shape),
    "half of them zero": lambda draw, shape: (
        draw.standard_normal(shape) * (draw.random(shape) < 0.5)
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "icq": {},
    "official": {"fallback": False, "tie_break": "first"},
    "no fallback": {"fallback": False},
    "fp4": {"quant_type": "fp4"},
    "mse": {"objective": "mse"},
    "mse, first": {"objective": "mse", "fallback": False, "tie_break": "first"},
    "mse, fp4, far": {"objective": "mse", "quant_type": "fp4", "range_factor": 2.0},
    "coarse": {"n": 7},
    "far": {"range_factor": 1.5},
    "too fine to divide": {"n": 2000},
}


def blocks_of(kind: str, count: int = 150, size: int = BLOCK) -> Tensor:
    values = WEIGHTS[kind](np.random.default_rng(0), (count, size))
    return torch.from_numpy(np.asarray(values).astype(np.float32))


def tau_is_that_of_all(blocks: Tensor, candidates: Candidates, reference: Candidates) -> None:
    tau, expected = search.best_tau(blocks, candidates), search_over_all(blocks, reference)
    assert torch.equal(tau.view(torch.int32), expected.view(torch.int32))


DEFAULT = ("icq", "mse", "official", "coarse")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in SETTINGS],
)
def test_tau_is_that_of_the_search_over_all_candidates(name: str) -> None:
    candidates = dataclasses.replace(ENTRY, **SETTINGS[name])
    for kind in WEIGHTS:
        blocks = blocks_of(kind, 8 if candidates.n > 1000 else 40)
        tau_is_that_of_all(blocks, candidates, candidates)
        tau_is_that_of_all(blocks.bfloat16().float(), candidates, candidates)
    mixed = torch.cat([blocks_of(kind, 9) for kind in WEIGHTS])
    tau_is_that_of_all(mixed[torch.randperm(len(mixed))], candidates, candidates)
    narrower = dataclasses.replace(candidates, range_factor=candidates.range_factor * 0.9)
    broken(tau_is_that_of_all, blocks_of("normal"), candidates, narrower)


@pytest.mark.parametrize("size", [32, 48, 128, 256, 512])
def test_blocks_of_every_size(size: int) -> None:
    for objective in ("entropy", "mse"):
        candidates = dataclasses.replace(ENTRY, objective=objective, n=20)
        for kind in ("normal", "heavy tails", "few values"):
            tau_is_that_of_all(blocks_of(kind, 20, size), candidates, candidates)


def every_crossing_is_at_its_candidate(grid: crossings.TauGrid) -> None:
    """The first candidate whose bound, as it is computed, is above the weight."""
    passed = crossings.find(grid)
    rows, along = passed.block[:, None], np.arange(grid.last + 1)[None]
    shifts = grid.factors[along] * grid.largest[rows]
    middles = grid.middles[passed.bound][:, None]
    bounds = grid.bounds(passed.block[:, None], shifts, middles)
    assert (passed.candidate == (passed.weight[:, None] < bounds).argmax(1)).all()


def test_rounding_decides_where_a_quotient_is_close_to_a_whole_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights lie on the bounds themselves: there the computed bounds are compared."""
    ordered = np.sort(blocks_of("normal", 300).numpy(), axis=1)
    middles = objectives.middles(objectives.sorted_levels("nf4", torch.device("cpu"))).numpy()
    factors = torch.tensor(ENTRY.factors).numpy()
    largest = np.maximum(ordered[:, -1], -ordered[:, 0])
    shifts = factors[70 : 70 + BLOCK - 2] * largest[:, None]
    scales = np.maximum(ordered[:, -1:] - shifts, shifts - ordered[:, :1])
    ordered[:, 1:-1] = scales * middles[9] + shifts
    grid = crossings.TauGrid(np.sort(ordered, axis=1), largest, factors, middles)
    every_crossing_is_at_its_candidate(grid)
    monkeypatch.setattr(crossings, "margin", lambda *_: 0.0)
    broken(every_crossing_is_at_its_candidate, grid)


def test_what_is_taken_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for objective in ("entropy", "mse"):
        candidates = dataclasses.replace(ENTRY, objective=objective)
        expected = search.best_tau(blocks_of("normal"), candidates)
        monkeypatch.setattr(search, "WEIGHTS_AT_ONCE", 7 * BLOCK)
        assert torch.equal(search.best_tau(blocks_of("normal"), candidates), expected)


def scores_are_of_bitsandbytes_codes(blocks: Tensor, shifts: Tensor, quant_type: str) -> None:
    config = dataclasses.replace(
        reader.quantizer("icq", "float32").config, quant_type=quant_type, double_quant=False
    )
    moved = icq._moved(blocks, shifts).float()
    codes = bnb_4bit.encode(moved, config).codes.view(len(blocks), -1)
    codes = torch.cat([codes >> 4, codes & 15], 1)
    counts = torch.stack([(codes == code).sum(1) for code in range(16)], 1)
    expected = -objectives.count_logs(blocks.shape[1], blocks.device)[counts].sum(1)
    scores = stored_codes.entropy_scores(blocks, shifts, "nf4")
    assert torch.equal(scores.long(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_stored_codes_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    for kind in WEIGHTS:
        if kind in ("huge", "any scale") and dtype == torch.float16:
            continue  # infinite there
        blocks = blocks_of(kind).to(dtype)
        for share in (0.0, 0.03, 0.5):
            shifts = blocks.float().abs().amax(1) * share
            scores_are_of_bitsandbytes_codes(blocks, shifts, "nf4")
    broken(scores_are_of_bitsandbytes_codes, blocks_of("normal"), torch.zeros(150), "fp4")
