"""Several ranks. The law: what a cell computes does not depend on how many processes compute it.
Evaluation gives the same numbers to the last bit; ZeRO-3, where no rank holds the model, the
same answers; plain DDP trains as DeepSpeed does."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import broken
from fixtures.process import PROGRAMS, on_ranks
from ranks_program import NAMES, OWN, STEPS

from finrepro.evaluation.share_out import share_out
from finrepro.runtime import ranks as ranks_runtime

PROGRAM = PROGRAMS / "ranks_program.py"
everywhere = pytest.mark.parametrize("name", NAMES)
Found = dict[str, Any]  # "1-0", "2-0", "2-1" -> what that rank found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """`found(part)`: what one rank, and two, have computed of a part of the program; each part
    runs once.
    """
    known: dict[str, Found] = {}

    def run(part: str) -> Found:
        if part not in known:
            folder = tmp_path_factory.mktemp(part)
            for count in (1, 2):
                on_ranks(PROGRAM, part, folder, count=count)
            known[part] = {
                path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")
            }
            assert sorted(known[part]) == ["1-0", "2-0", "2-1"]
        return known[part]

    return run


def are_equal(one: Any, other: Any) -> None:
    """To the last bit: rows, scores, tokens."""
    assert one == other


@pytest.mark.slow
@everywhere
def test_rows_and_scores_are_those_of_one_rank_to_the_last_bit(
    name: str, found: Callable[[str], Found]
) -> None:
    one, first, second = (found("evaluation")[rank] for rank in ("1-0", "2-0", "2-1"))
    assert len({row["prediction"] for row in one[name]["choices"]["rows"]}) > 1
    assert len({len(row) for row in one[name]["ended"]}) > 1
    for rank in (first, second):
        are_equal(rank[name], one[name])
        are_equal(rank[name, "single rows"], one[name, "single rows"])
        broken(are_equal, rank[name, "mutant"], one[name, "mutant"])
    are_equal(one[name, "mutant"], one[name, "single rows"])  # on one rank the mutant does nothing


def answers_agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same labels and tokens, log-probabilities within 1e-5."""
    for mine, theirs in zip(one["choices"]["rows"], other["choices"]["rows"], strict=True):
        assert mine["prediction"] == theirs["prediction"]
        np.testing.assert_allclose(
            list(mine["logprobs"].values()), list(theirs["logprobs"].values()), rtol=1e-5
        )
    values = [[row["logprob"] for row in each["text"]["rows"]] for each in (one, other)]
    np.testing.assert_allclose(*values, rtol=1e-5)
    assert (one["tokens"], one["ended"]) == (other["tokens"], other["ended"])


@pytest.mark.slow
@everywhere
@pytest.mark.parametrize(
    ("adapter", "steps"), [("full", STEPS), ("lora_r8", STEPS), ("lora_r8", 0)]
)
def test_a_model_in_parts_answers_like_a_whole_one_and_no_rank_ever_holds_it(
    name: str, adapter: str, steps: int, found: Callable[[str], Found]
) -> None:
    one, first, second = (
        found("zero")[rank][name, adapter, steps] for rank in ("1-0", "2-0", "2-1")
    )
    assert first["answers"] == second["answers"]
    answers_agree(first["answers"], one["answers"])
    assert one["parts"] == 0 and one["largest"] in (0, one["held"])
    for rank in (first, second):
        assert rank["parts"] > 20 and rank["held"] == 0, "in parts again after every pass"
        assert 0 < rank["largest"] < one["held"] / 3, "never more than a layer at a time"
    # What was trained is whole again on the rank that exports it, and only there.
    assert set(first["weights"]) == set(one["weights"]) and bool(one["weights"]) == bool(steps)
    for key, value in one["weights"].items():
        assert (first["weights"][key] - value).norm() <= 1e-2 * value.norm(), key
        assert second["weights"][key].numel() == 0
    other = found("zero")["1-0"][name, "lora_r8", 0 if steps else STEPS]["answers"]
    broken(answers_agree, first["answers"], other)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1-0", "2-0", "2-1"])
def test_plain_ddp_trains_as_deepspeed_does_and_resumes_to_the_last_bit(
    ranks: str, found: Callable[[str], Found]
) -> None:
    runs = found("training")[ranks]
    for key, expected in runs.items():
        if key.endswith("-resumed"):
            whole = runs[key.removesuffix("-resumed")]
            assert expected["losses"] == whole["losses"] and len(whole["losses"]) == STEPS
            assert all(
                torch.equal(value, whole["weights"][name])
                for name, value in expected["weights"].items()
            )
        elif key.startswith("deepspeed"):
            plain = runs[key.replace("deepspeed", "ddp", 1)]
            np.testing.assert_allclose(plain["losses"], expected["losses"], rtol=1e-6, err_msg=key)
            for name, value in expected["weights"].items():
                assert (plain["weights"][name] - value).norm() <= 1e-6 * value.norm(), (key, name)
    assert len({tuple(map(tuple, run["losses"])) for run in runs.values()}) == 4, (
        "cells that are all alike prove nothing"
    )


@pytest.mark.slow
def test_ddp_on_two_ranks_computes_what_it_computes_on_one(found: Callable[[str], Found]) -> None:
    one, two = found("training")["1-0"], found("training")["2-0"]
    for key in one:
        np.testing.assert_allclose(two[key]["losses"], one[key]["losses"], rtol=1e-4, err_msg=key)


@pytest.mark.slow
@everywhere
@pytest.mark.parametrize("adapter", [adapter for adapter, _ in OWN])
@pytest.mark.parametrize(
    ("engine", "stage"), [("ddp", 0), *(("deepspeed", stage) for stage in range(4))]
)
def test_our_own_layers_compute_on_two_ranks_what_they_compute_on_one(
    name: str, adapter: str, engine: str, stage: int, found: Callable[[str], Found]
) -> None:
    one, first, second = (
        found("own")[rank][name, adapter, engine, stage] for rank in ("1-0", "2-0", "2-1")
    )
    are_trained_alike(first, one)
    assert first["losses"] == second["losses"] and len(set(one["losses"])) == STEPS
    assert first["tokens"] == second["tokens"] and not second["tensors"]
    last = max(one["tensors"])
    broken(
        are_trained_alike,
        first,
        one | {"tensors": {**one["tensors"], last: 1.1 * one["tensors"][last]}},
    )
    broken(are_trained_alike, first | {"losses": first["losses"][::-1]}, one)


def are_trained_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same losses within 1e-4, the same answers, and exported tensors within a hundredth of
    their length.
    """
    np.testing.assert_allclose(one["losses"], other["losses"], rtol=1e-4)
    assert (
        one["tokens"] == other["tokens"]
        and one["tensors"].keys() == other["tensors"].keys() != set()
    )
    for key, value in other["tensors"].items():
        assert value.any() and (one["tensors"][key] - value).norm() <= 1e-2 * value.norm(), key


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # as where it is not installed
from pathlib import Path
from ranks_program import CPU, FEW, NAMES, control, make, process, random_examples, spec_of, train
process.quiet_environment()
process.setup(0, 1)
spec = spec_of(NAMES[0], "lora_r8", "nf4", **FEW, engine=sys.argv[2])
model = make(spec).model
trained = train(model, random_examples(0, 30), spec, CPU, control(Path(sys.argv[1])))
print(len(trained.losses))
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_plain_ddp_needs_no_deepspeed(engine: str, tmp_path: Path) -> None:
    call = [sys.executable, "-c", WITHOUT_DEEPSPEED, str(tmp_path), engine]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=120)
    if engine == "ddp":
        assert done.stdout.split() == [str(STEPS)], done.stderr[-2000:]
    else:
        assert done.returncode and "deepspeed" in done.stderr.splitlines()[-1]


# --- the share-out itself, one rank at a time


@pytest.mark.parametrize("together", [False, True])
def test_one_rank_computes_every_batch_once_in_order(together: bool) -> None:
    batches, seen = [[3, 0], [2], [1, 4]], []

    def compute(rows: Sequence[int]) -> list[str]:
        seen.append(list(rows))
        return [f"row {row}" for row in rows]

    assert share_out(batches, compute, together=together) == [f"row {row}" for row in range(5)]
    assert seen == batches


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ranks_have_disjoint_batches_and_together_equally_many_passes(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each of three ranks computes, before they exchange it."""
    batches = [[row] for row in range(count)]
    for together in (False, True):
        seen: dict[int, list[int]] = {}
        for rank in range(3):
            computed = seen[rank] = []
            exchanged: list[Any] = []
            monkeypatch.setattr(
                ranks_runtime, "current", lambda rank=rank: ranks_runtime.Ranks(rank, 3, rank)
            )
            monkeypatch.setattr(
                "torch.distributed.all_gather_object",
                lambda _, mine, kept=exchanged: kept.append(mine),
            )
            with pytest.raises((AttributeError, TypeError)):  # the other ranks' parts are missing
                share_out(
                    batches,
                    lambda rows, kept=computed: kept.extend(rows) or rows,
                    together=together,
                )
            assert sorted(exchanged[0]) == list(range(rank, count, 3))
        passes = {len(computed) for computed in seen.values()}
        assert passes == (
            {-(-count // 3)} if together else {len(range(rank, count, 3)) for rank in range(3)}
        )
