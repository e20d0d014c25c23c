"""Law: a pretraining cell walks from running text to a sealed result, is scored again in fewer
bits, and says the same twice.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from finrepro.catalogue import reader, resolve
from finrepro.catalogue.compatibility import refusal
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec
from finrepro.evaluation import quantized
from finrepro.evidence.place import Place
from finrepro.evidence.store import open_store
from finrepro.reporting import pretraining
from finrepro.running.cell import run_cell
from finrepro.running.seal import median_step
from finrepro.sizes.shapes import rank

MODEL = "gpt2_1_5b_deep_mini_lr_r64"  # of a rank that 4-bit blocks divide
STEPS = 4


def label(model: str = MODEL, optimizer: str = "adamw_frobenius") -> str:
    return f"{model}-none-full-wikitext2_text-{optimizer}-s0"


def cell(**changes: Any) -> RunSpec:
    """The low-rank cell of Table 2, cut to a few steps and to one article."""
    found = resolve.spec_of_label(Selection(table="2", full=True), "smoke", label())
    dataset = found.tasks[0].dataset
    one = dataclasses.replace(
        dataset, config=dataclasses.replace(dataset.config, articles={"test": 1})
    )
    tasks = tuple(dataclasses.replace(each, dataset=one) for each in found.tasks)
    part = dataclasses.replace(found.train_on.parts[0], task=tasks[0])
    train = dataclasses.replace(
        found.train, max_steps=STEPS, warmup_steps=1, global_batch_size=2, max_seq_len=64
    )
    return dataclasses.replace(
        found,
        train=train,
        tasks=tasks,
        train_on=dataclasses.replace(found.train_on, parts=(part,)),
        **changes,
    )


def walked(folder: Path) -> tuple[dict[str, Any], Place]:
    place = Place(open_store(folder), None, None)
    return run_cell(cell(), place, lambda _: None, lambda: False), place


@pytest.mark.slow
def test_it_is_scored_stored_and_the_same_twice(tmp_path: Path):
    result, place = walked(tmp_path / "one")
    again, other = walked(tmp_path / "two")
    assert result["status"] == "done", result["reason"]
    scores = {(score["task"], score["metric"]): score["value"] for score in result["scores"]}
    names = [
        "wikitext2_text",
        *(quantized.task_name("wikitext2_text", each) for each in ("int8", "nf4")),
    ]
    assert set(scores) == {
        (name, metric) for name in names for metric in ("perplexity", "bits_per_byte")
    }
    # A model that has hardly learned says about the same as a uniform one, in every form; yet no
    # two forms say the same.
    perplexities = [scores[name, "perplexity"] for name in names]
    assert all(100 < value < 1100 for value in perplexities) and len(set(perplexities)) == 3
    costs = result["costs"]
    assert costs["train_tokens"] == STEPS * 2 * 64 and costs["useful_token_share"] == 1.0
    assert costs["base_bytes"] > costs["bytes_as_int8"] > costs["bytes_as_nf4"] > 0
    assert costs["total_params"] == reader.model(MODEL).parameters == costs["trainable_params"]
    assert costs["matmul_flops"] > 0 and costs["step_seconds"] > 0
    assert result["scores"] == again["scores"]
    for name in ("loss.jsonl", "predictions.jsonl"):
        lines = [
            [
                {key: value for key, value in json.loads(line).items() if key != "seconds"}
                for line in text.splitlines()
            ]
            for text in (
                (each.store.run_folder(result["run_id"]) / name).read_text()
                for each in (place, other)
            )
        ]
        assert lines[0] == lines[1]


def test_the_arithmetic_of_a_cell_needs_no_run():
    facts = pretraining.facts(cell())
    model, dense = reader.model(MODEL), reader.model("gpt2_1_5b_deep_mini")
    assert facts["reference"] == dense.name and facts["rank"] == rank(model)
    assert (
        facts["compression"] == pytest.approx(dense.parameters / model.parameters)
        and facts["compression"] > 1.9
    )
    assert (
        facts["stored_bytes"]["none"]
        == 2 * model.parameters
        > facts["stored_bytes"]["int8"]
        > facts["stored_bytes"]["nf4"]
    )
    assert (
        facts["flop_bound"] > 1
        and facts["flops_per_token"]["palm"] > facts["flops_per_token"]["causal"]
    )
    plain = dataclasses.replace(cell(), model=dense)
    assert pretraining.facts(plain)["flop_bound"] == pretraining.facts(plain)["compression"] == 1
    assert pretraining.facts(plain)["rank"] is None
    narrow = dataclasses.replace(cell(), model=reader.model("gpt2_1_5b_deep_mini_lr"))
    assert pretraining.facts(narrow)["stored_bytes"]["nf4"] is None, "blocks would cross rows of 41"


def test_the_dense_model_of_equal_parameters_has_as_many_within_half_a_percent():
    for small, equal in (
        ("gpt2_1_5b_deep_mini_lr", "gpt2_1_5b_deep_mini_equal"),
        ("gpt2_1_5b_lr_2_64x", "gpt2_1_5b_equal"),
        ("gpt2_127m_lr_2_64x", "gpt2_127m_equal"),
    ):
        numbers = [reader.model(name).parameters for name in (small, equal)]
        assert math.isclose(*numbers, rel_tol=5e-3)


def test_a_quantizer_that_cannot_hold_the_model_is_left_out():
    assert [each.name for each in quantized.possible(cell())] == ["int8", "nf4"]
    narrow = dataclasses.replace(cell(), model=reader.model("gpt2_1_5b_deep_mini_lr"))
    assert [each.name for each in quantized.possible(narrow)] == ["int8"]
    assert quantized.possible(dataclasses.replace(cell(), world_size=2)) == []


def test_a_model_that_starts_from_trained_weights_is_not_pretrained_from_scratch():
    decomposed = reader.model("gpt2_127m_mini_svd_r64")
    reason = refusal(dataclasses.replace(cell(), model=decomposed))
    assert reason == "starts from the trained weights of gpt2_127m_mini, not from scratch"


def test_what_a_table_trains_from_scratch_has_no_base():
    spec = resolve.spec_of_label(
        Selection(table="2", full=True), "paper", "gpt2_127m-none-full-openwebtext-adamw-s0"
    )
    assert spec.weights == "scratch" and spec.base_run is None and spec.base_checkpoint is None


def test_the_first_steps_warm_up_and_are_not_counted():
    ends = [9.0, 12.0, 13.0, 14.5, 15.5]
    assert median_step([{"seconds": end} for end in ends]) == 1.0
    assert median_step([{"seconds": 1.0}]) is None and median_step([]) is None
