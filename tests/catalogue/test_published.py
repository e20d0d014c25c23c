"""Law: a published value is set against ours only where both measure the same thing, and a
verdict claims no more than intervals show.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from statistics import stdev
from typing import Any

import numpy as np
import pytest

from finrepro.catalogue import reader
from finrepro.catalogue.published import Published, read
from finrepro.errors import UsageError
from finrepro.reporting.beside import margin_of
from finrepro.reporting.comparability import Comparison, candidates, comparability
from finrepro.reporting.scores import FAMILIES
from finrepro.reporting.tables.table5 import PUBLISHED
from finrepro.settings import read_yaml
from finrepro.statistics.equivalence import (
    Estimate,
    Judgement,
    estimate,
    half_width,
    judge,
    student_half_width,
)

FILES = sorted((reader.CONFIGS / "published").glob("*.yaml"))
VALUES = {
    value.name: value for path in FILES for value in read(read_yaml(path), f"published.{path.stem}")
}
Judge = Callable[[Estimate | None, float, float], Judgement]


def raw(name: str) -> dict[str, Any]:
    return copy.deepcopy(read_yaml(reader.CONFIGS / "published" / f"{name}.yaml"))


def cell(**changes: Any) -> dict[str, Any]:
    """The cell that FinGPT v3.2's value on TFNS belongs to."""
    fixed = {
        "model": "llama2_7b_chat",
        "quantizer": "int8",
        "adapter": "lora_r8",
        "train_on": "fingpt_mix",
        "state": "done",
        "weights": "pretrained",
        "short": False,
        "batch": 64,
        "devices": 1,
        "prompts": {"tfns": "fingpt"},
    }
    return fixed | changes


# The files


def test_every_source_is_read_whole():
    assert {path.stem for path in FILES} >= {
        "finlora",
        "finlora_interim",
        "finlora_memory",
        "fingpt",
    }
    assert {value.source.split("@")[0] for value in VALUES.values()} == {
        "Open-Finance-Lab/FinLoRA",
        "wangd12rpi/FinLoRA",
        "wangd12rpi/fin-llm",
        "AI4Finance-Foundation/FinGPT",
    }
    assert all(value.source.split("@")[1][:7].isalnum() for value in VALUES.values())
    assert VALUES["finlora.lora.fpb.acc"].value == 0.8564
    assert VALUES["finlora_memory.r8_4bit.b8.peak"].value == 8.65
    assert VALUES["finlora.lora_multi_task.ner.acc"].value == 0.7607


def test_names_of_ours_are_in_the_catalogue():
    for value in VALUES.values():
        known = {
            "models": value.system.model,
            "adapters": value.system.adapter,
            "quantizers": value.system.quantizer,
            "mixes": value.system.train_on,
            "tasks": value.test_set.task,
        }
        for kind, name in known.items():
            assert name is None or name in reader.entries(kind), (
                f"{value.name}: {kind} has no {name}"
            )
        assert set(value.system.one_of) <= set(reader.entries("quantizers")), value.name
        assert not (value.system.one_of and value.system.quantizer), (
            f"{value.name}: known, and disagreed about"
        )
        assert value.measure.ours is None or value.measure.beside is None, value.name


def is_a_share(value: float, n: int, digits: int) -> bool:
    """Whether some k of n rows prints as this value, rounded or cut."""
    near = [(k + round(value * n)) / n for k in (-1, 0, 1)]
    return any(
        math.isclose(round(x, digits), value)
        or math.isclose(int(x * 10**digits) / 10**digits, value)
        for x in near
    )


def misprints(values: list[Published]) -> list[str]:
    """Accuracies that no number of right answers on their test set gives: a typing error, or
    another test set.
    """
    digits = {"finlora": 4, "finlora_interim": 4, "fingpt": 3}
    return [
        v.name
        for v in values
        if v.measure.ours == "accuracy"
        and v.test_set.n
        and not is_a_share(v.value, v.test_set.n, digits[v.name.split(".")[0]])
    ]


def test_every_accuracy_is_a_fraction_of_its_test_set():
    assert misprints(list(VALUES.values())) == []


@pytest.mark.parametrize(
    ("system", "test_set", "wrong", "typed"),
    [
        ("lora", "fpb", "fpb", 0.8546),
        ("lora", "fiqa_235", "fiqa_275", 0.8128),
        ("base_8b", "fiqa_275", "fiqa_235", 0.4655),
    ],
)
def test_a_value_with_swapped_digits_or_beside_another_test_set_is_found(
    system: str, test_set: str, wrong: str, typed: float
):
    """The planted mutants of the law above."""
    file = raw("finlora")
    numbers = file["values"][system].pop(test_set)
    file["values"][system][wrong] = numbers | {"acc": typed}
    assert misprints(list(read(file, "published.finlora"))) == [f"finlora.{system}.{wrong}.acc"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda f: f["values"].update(lorra=f["values"].pop("lora")),
            "published.x: unknown system 'lorra'. Did you mean 'lora'?",
        ),
        (
            lambda f: f["values"]["lora"].update(fbp={"acc": 0.5}),
            "unknown test set 'fbp'. Did you mean 'fpb'?",
        ),
        (
            lambda f: f["values"]["lora"]["fpb"].update(accu=0.5),
            "unknown metric 'accu'. Did you mean 'acc'?",
        ),
        (lambda f: f["systems"]["lora"]["defects"].append("Z"), "unknown defect 'Z'"),
        (lambda f: f["everywhere"].append("Z"), "unknown defect 'Z'"),
        (lambda f: f["defects"].update(Y="nobody's"), "published.x.defects.Y: no value uses it."),
        (lambda f: f["systems"]["lora"].update(rank=8), "systems"),
        (lambda f: f["values"]["lora"]["fpb"].update(acc="85.64"), "values"),
        (lambda f: f.pop("source"), "source"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(change: Callable[[dict[str, Any]], Any], said: str):
    file = raw("finlora")
    change(file)
    with pytest.raises(UsageError) as error:
        read(file, "published.x")
    assert said in str(error.value) and "\n" not in str(error.value)


# Comparability


def test_the_cell_that_a_value_belongs_to_is_comparable_with_the_reservations_that_are_facts():
    found = comparability(VALUES["fingpt.v3_2.tfns.acc"], cell(), 2388)
    assert found.level == "with reservations"
    text = "; ".join(found.reasons)
    assert "alpha 32" in text and "label likelihoods here" in text and "collator" in text
    assert "trained there on" not in text and "prompt fingpt there" not in text
    for said in (
        "its tokens are not",
        "a development tenth is cut out",
        "perhaps sampled",
        "a single run",
        "bits are not known",
        "fp16=True",
    ):
        assert said in text, said
    assert "a development tenth" not in "; ".join(
        comparability(VALUES["fingpt.v3_2.tfns.acc"], cell(train_on="tfns"), 2388).reasons
    )


def test_a_value_without_reservations_is_plainly_comparable():
    file = raw("fingpt")
    system = file["systems"]["v3_2"]
    system |= {
        "quantizer": "int8",
        "one_of": [],
        "recipe": None,
        "train_on_differs": None,
        "defects": [],
    }
    file["metrics"] = {"f1": {"ours": "f1_entity", "says": "entity F1"}}
    file |= {
        "values": {"v3_2": {"tfns": {"f1": 0.9}}},
        "defects": {},
        "everywhere": [],
        "systems": {"v3_2": system},
        "test_sets": {"tfns": file["test_sets"]["tfns"] | {"defects": []}},
    }
    (value,) = read(file, "published.x")
    assert comparability(value, cell(), 2388) == Comparison("comparable", ())
    assert comparability(value, cell(state="stale"), 2388).level == "with reservations"
    assert (
        "prompt fingpt there, short here"
        in comparability(value, cell(prompts={"tfns": "short"}), 2388).reasons
    )


@pytest.mark.parametrize(
    ("name", "changes", "n", "reason"),
    [
        ("fingpt.v3_2.tfns.acc", {"weights": "random"}, 2388, "random weights here"),
        ("fingpt.v3_2.tfns.acc", {"short": True}, 2388, "too few steps"),
        (
            "fingpt.v3_2.tfns.acc",
            {"model": "llama2_7b"},
            2388,
            "Llama-2-7b-chat there, llama2_7b here",
        ),
        ("fingpt.v3_2.tfns.acc", {"adapter": "lora_r4"}, 2388, "lora_r4 here"),
        ("fingpt.v3_2.tfns.acc", {"quantizer": "nf4"}, 2388, "quantizer none or int8 there"),
        ("fingpt.v3_3.tfns.acc", {"quantizer": "nf4"}, 2388, "quantizer int8 there"),
        ("fingpt.v3_2.fiqa.acc", {}, 235, "test set of 275 rows there, 235 here"),
        ("fingpt.base_7b.tfns.acc", {"adapter": "base"}, 2388, "untuned model's score"),
        (
            "fingpt.base_7b.tfns.acc",
            {"adapter": "base", "prompts": {"tfns": "short"}},
            2388,
            "prompt fingpt there, short here",
        ),
        (
            "finlora.lora.tfns.acc",
            {"model": "llama3_1_8b_instruct"},
            2388,
            "swaps neutral and positive",
        ),
        ("finlora.lora.ner.acc", {"model": "llama3_1_8b_instruct"}, 3502, "another task"),
        ("finlora.lora.fpb.f1", {"model": "llama3_1_8b_instruct"}, 1212, "not a weighted F1"),
        (
            "finlora_memory.r8_8bit.b4.peak",
            {"model": "llama3_1_8b", "batch": 16},
            None,
            "batch of 4 there",
        ),
    ],
)
def test_another_quantity_is_not_comparable_and_says_why(
    name: str, changes: dict[str, Any], n: int | None, reason: str
):
    found = comparability(VALUES[name], cell(**changes), n)
    assert found.level == "not comparable"
    assert any(reason in each for each in found.reasons), found.reasons


def test_other_data_and_other_bits_are_reservations():
    other = comparability(VALUES["fingpt.v3_2.tfns.acc"], cell(train_on="tfns"), 2388)
    assert other.level == "with reservations" and any(
        "trained there on: FPB x6" in each for each in other.reasons
    )
    row = cell(model="llama3_1_8b_instruct", quantizer="nf4", adapter="lora_r4")
    four_bit = comparability(VALUES["finlora_interim.4bit_r4.tfns.acc"], row, 2388)
    assert (
        four_bit.level == "with reservations"
        and "scored there with quantizer none" in four_bit.reasons
    )
    assert any("quantization commented out" in reason for reason in four_bit.reasons)


def test_what_is_only_inferred_or_disagreed_about_is_said_to_be():
    one = comparability(
        VALUES["fingpt.benchmark_llama2.tfns.acc"], cell(model="llama2_7b", quantizer="none"), 2388
    )
    text = "; ".join(one.reasons)
    assert (
        one.level == "with reservations"
        and "inferred from the code" in text
        and "trained there on: not stated" in text
    )
    row = cell(model="llama3_1_8b_instruct", train_on="fpb", prompts={"fpb": "fingpt"})
    assert any(
        "0/1 Adam and fp16 are inferred" in r
        for r in comparability(VALUES["finlora.lora.fpb.acc"], row, 1212).reasons
    )


def test_a_question_of_another_kind_needs_no_reason_about_how_answers_are_read():
    row = cell(
        model="llama3_1_8b_instruct",
        quantizer="none",
        adapter="base",
        prompts={"fin_ner": "fingpt"},
    )
    reasons = comparability(VALUES["finlora.base_8b.ner.acc"], row, 303).reasons
    assert any("another task" in r for r in reasons) and not any(
        "label likelihoods" in r for r in reasons
    )


def test_their_own_adapter_scored_here_needs_no_reservation_about_its_training():
    value = VALUES["fingpt.v3_2.tfns.acc"]
    row = cell(adapter="FinGPT_v32_Llama2_Sentiment_Instruction_LoRA_FT", train_on="tfns")
    assert value in candidates(tuple(VALUES.values()), row, "tfns", ["accuracy"])
    found = comparability(value, row, 2388)
    assert found.level == "with reservations" and not any(
        "trained there" in reason for reason in found.reasons
    )
    assert comparability(value, cell(adapter="other_folder"), 2388).level == "not comparable"


def test_a_reader_finds_the_values_of_the_models_size_and_no_others():
    found = {
        v.name
        for v in candidates(
            tuple(VALUES.values()), cell(model="llama2_7b"), "tfns", ["accuracy", "f1_weighted"]
        )
    }
    assert found == {"fingpt.v3_2.tfns.acc", "fingpt.v3_2.tfns.f1"}
    assert not candidates(tuple(VALUES.values()), cell(model="llama2_13b"), "fin_ner", ["accuracy"])
    assert not candidates(tuple(VALUES.values()), cell(model="gpt2_127m"), "tfns", ["accuracy"])


def paper_rows() -> Iterator[tuple[dict[str, Any], str | None, Sequence[str]]]:
    """Every cell of Tables 3 and 5 at paper scale as (row, task, the metrics looked for)."""
    quality = {"fin_ner": ("f1_entity", *FAMILIES["f1_entity"])}
    for table, batches in (("table3", [64]), ("table5", [4, 8])):
        axes = reader.table(table).paper.axes
        for model, quantizer, adapter, train_on, batch in product(
            axes.model, axes.quantizer, axes.adapter, axes.train_on, batches
        ):
            row = cell(
                model=model, quantizer=quantizer, adapter=adapter, train_on=train_on, batch=batch
            )
            if table == "table5":
                yield row, None, PUBLISHED
            else:
                yield row, train_on, quality.get(train_on, ("accuracy", *FAMILIES["accuracy"]))


def test_every_value_can_stand_beside_a_cell_unless_its_system_has_no_adapter_here():
    values = tuple(VALUES.values())
    seen = {
        v.name
        for row, task, metrics in paper_rows()
        for v in candidates(values, row, task, metrics)
    }
    assert [v.name for v in values if v.system.adapter is not None and v.name not in seen] == []
    silent = {v.name.rsplit(".", 2)[0] for v in values if v.name not in seen}
    assert silent == {"finlora.three_shot", "finlora_memory.base_16bit"}


# Verdicts


def ours(value: float, half: float, seeds: int = 3) -> Estimate:
    return Estimate(value, value - half, value + half, 1000, seeds)


LADDER = [
    (ours(0.85, 0.01), "EQUIVALENT"),
    (ours(0.87, 0.02), "EQUIVALENT"),  # the interval ends on the margin
    (ours(0.88, 0.02), "INCONCLUSIVE"),  # the value lies inside, its interval does not
    (ours(0.85, 0.05), "INCONCLUSIVE"),  # equal, and measured too coarsely to say so
    (ours(0.90, 0.02), "INCONCLUSIVE"),  # outside, its interval not
    (ours(0.92, 0.02), "DIFFERS"),
    (ours(0.78, 0.02), "DIFFERS"),
    (None, "NOT RUN"),
]


def broken(judge: Judge) -> list[tuple[float | None, str]]:
    """Cases of the ladder that a judge gets wrong; published 0.85, margin 0.04."""
    given = [(each, judge(each, 0.85, 0.04).verdict, wanted) for each, wanted in LADDER]
    return [(each and each.value, verdict) for each, verdict, wanted in given if verdict != wanted]


def test_the_ladder():
    assert broken(judge) == []


def overlap(each: Estimate | None, published: float, margin: float) -> Judgement:
    """What is done everywhere: intervals overlap, so it reproduced."""
    if each is None:
        return judge(each, published, margin)
    inside = each.low <= published + margin and each.high >= published - margin
    return Judgement("EQUIVALENT" if inside else "DIFFERS", "")


def by_value(each: Estimate | None, published: float, margin: float) -> Judgement:
    """Without the interval."""
    return judge(
        each and Estimate(each.value, each.value, each.value, each.n, each.seeds), published, margin
    )


def one_sided(each: Estimate | None, published: float, margin: float) -> Judgement:
    """Better is always fine."""
    worse = each is not None and each.low < published - margin
    return judge(each, published, margin) if worse or each is None else Judgement("EQUIVALENT", "")


@pytest.mark.parametrize("mutant", [overlap, by_value, one_sided])
def test_the_ladder_finds_a_judge_that_claims_too_much(mutant: Judge):
    assert broken(mutant)


def test_a_verdict_says_how_far_it_reaches():
    assert judge(ours(0.86, 0.01), 0.85, 0.04).text == "+0.010, margin 0.040"
    assert judge(ours(0.86, 0.01, seeds=1), 0.85, 0.04).text == "+0.010, margin 0.040, 1 seed only"
    assert judge(ours(0.86, 0.01, seeds=2), 0.85, 0.04).text.endswith("2 seeds only")
    # Half-width 0.05 has to become 0.04: (0.05 / 0.04)^2 times the examples.
    assert judge(ours(0.85, 0.05), 0.85, 0.04).text.endswith("needs about 1,563 test examples")
    spread = Estimate(0.85, 0.79, 0.91, 1000, 3, spread=0.055)
    assert judge(spread, 0.85, 0.04).text.endswith("needs more seeds")
    with pytest.raises(ValueError, match="margin"):
        judge(ours(0.85, 0.01), 0.85, 0.0)


def test_the_needed_number_of_examples_decides():
    wide = ours(0.86, 0.05)
    n = int(judge(wide, 0.85, 0.04).text.split("about ")[1].split(" ")[0].replace(",", ""))
    half = 0.05 * math.sqrt(1000 / n)
    assert judge(Estimate(0.86, 0.86 - half, 0.86 + half, n, 3), 0.85, 0.04).verdict == "EQUIVALENT"
    half = 0.05 * math.sqrt(1000 / (n - 2))
    assert (
        judge(Estimate(0.86, 0.86 - half, 0.86 + half, n - 2, 3), 0.85, 0.04).verdict
        == "INCONCLUSIVE"
    )


def test_the_half_width_over_runs_has_students_quantile():
    """Of printed tables; and of the closed forms of one and two degrees of freedom."""
    tables = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042}
    quantiles = {}
    for degrees in tables:
        values = [float(run) for run in range(degrees + 1)]
        quantiles[degrees] = student_half_width(values) * math.sqrt(len(values)) / stdev(values)
    assert {degrees: round(value, 3) for degrees, value in quantiles.items()} == tables
    assert quantiles[1] == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)
    assert quantiles[2] == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)


def test_the_interval_over_seeds_holds_the_true_value_as_often_as_it_says():
    """Three seeds, spread between runs and sampling noise of equal size: 95 % of the intervals
    hold the truth, or a few more.
    """
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        test_set = generator.normal(0, 0.01)  # the seeds share the test set
        values = list(0.8 + test_set + generator.normal(0, 0.01, size=3))
        each = estimate(values, [v - 0.0196 for v in values], [v + 0.0196 for v in values], 1000)
        held += each.low <= 0.8 <= each.high
    assert 0.94 <= held / 2000 <= 0.99
    single = estimate([0.8], [0.78], [0.83], 1000)
    assert (single.low, single.high, single.spread, single.seeds) == (
        pytest.approx(0.78),
        pytest.approx(0.83),
        0.0,
        1,
    )


def test_margins_are_two_sampling_half_widths_and_accept_an_equal_model_19_times_in_20():
    """Half-widths in points, from 1.96 sqrt(p (1 - p) / n) by hand."""
    for name, points in {
        "finlora.lora.fpb.acc": 2.0,
        "finlora.base_8b.fiqa_275.acc": 5.9,
        "fingpt.v3_3.tfns.acc": 1.2,
        "finlora.lora.nwgi.acc": 1.5,
    }.items():
        value = VALUES[name]
        assert 100 * half_width(value.value, value.test_set.n or 0) == pytest.approx(
            points, abs=0.06
        )
        assert margin_of(value) == pytest.approx(2 * half_width(value.value, value.test_set.n or 0))
    assert margin_of(VALUES["finlora_memory.r4_4bit.b4.peak"]) is None
    assert {v.measure.ours for v in VALUES.values() if margin_of(v)} == {
        "accuracy"
    }  # an F1 is no share of rows
    value = VALUES["fingpt.v3_2.tfns.acc"]
    n, truth, margin = value.test_set.n or 0, value.value, margin_of(value) or 0.0
    shares = np.random.default_rng(1).binomial(n, truth, size=2000) / n
    verdicts = [
        judge(Estimate(s, s - half_width(s, n), s + half_width(s, n), n, 3), truth, margin).verdict
        for s in shares
    ]
    assert verdicts.count("EQUIVALENT") / 2000 == pytest.approx(0.95, abs=0.015)
    assert "DIFFERS" not in verdicts
