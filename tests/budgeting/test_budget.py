"""Law: a budget is arithmetic on a GPU's numbers and a published law - the optimum is one, time
and tokens are inverse, and every constant says where it was read."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from fixtures.model import broken
from fixtures.process import one_line

from finrepro.budgeting import estimates, scaling
from finrepro.budgeting.command import budget_of, checked_request
from finrepro.catalogue import reader
from finrepro.errors import UsageError
from finrepro.evidence.place import Place
from finrepro.runtime.matmul import Rate
from finrepro.sizes import flops

LAWS = scaling.laws()
MODELS = tuple(model.name for model in estimates.catalogue_models())
OPERATIONS = (1e19, 2.73e20, 5.76e23)


def cluster(gpu: str = "h100", devices: str = "1", mfu: str = "0.4") -> estimates.Cluster:
    return checked_request(gpu=gpu, gpus=devices, mfu=mfu, hours="1").cluster


def is_optimal(
    law: scaling.Law, point: scaling.Optimum, operations: float, unique: float | None = None
) -> None:
    """On the line C = 6 N D no neighbour is better, and where nothing repeats both terms pull
    alike.
    """
    assert 6 * point.parameters * point.tokens == pytest.approx(operations)
    assert point.loss == pytest.approx(scaling.loss(law, point.parameters, point.tokens, unique))
    for factor in (0.9, 0.99, 1.01, 1.1):
        size = point.parameters * factor
        assert scaling.loss(law, size, operations / 6 / size, unique) >= point.loss
    if unique is None:
        pulls = (
            law.alpha * law.A / point.parameters**law.alpha,
            law.beta * law.B / point.tokens**law.beta,
        )
        assert pulls[0] == pytest.approx(pulls[1])


@pytest.mark.parametrize("operations", OPERATIONS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_the_optimum_is_one(law: scaling.Law, operations: float):
    point = scaling.optimum(law, operations)
    is_optimal(law, point, operations)
    size = point.parameters * 1.2
    tokens = operations / 6 / size
    broken(
        is_optimal,
        law,
        scaling.Optimum(size, tokens, scaling.loss(law, size, tokens)),
        operations,
    )
    for share in (3.0, 1 / 5, 1 / 40):  # more than enough tokens, and far too few
        is_optimal(
            law,
            scaling.optimum(law, operations, share * point.tokens),
            operations,
            share * point.tokens,
        )


def test_with_enough_different_tokens_the_searched_optimum_is_the_closed_form():
    for law in LAWS:
        closed, searched = (scaling.optimum(law, 1e21, unique) for unique in (None, 1e30))
        assert searched.parameters == pytest.approx(
            closed.parameters, rel=1e-3
        ) and searched.loss == pytest.approx(closed.loss)


def test_the_optima_are_those_that_the_papers_tell():
    """At Chinchilla's 5.76e23 operations: 93 tokens a parameter by the rounded constants, about
    20 by the others (arXiv 2404.10102).
    """
    ratios = {}
    for law in LAWS:
        point = scaling.optimum(law, 5.76e23)
        ratios[law.name] = point.tokens / point.parameters
    assert ratios == pytest.approx(
        {"hoffmann": 92.6, "besiroglu": 18.4, "muennighoff": 19.6}, rel=0.01
    )
    law = scaling.law("muennighoff")
    assert scaling.different_parameters(law, 1e9) / 1e9 == pytest.approx(
        0.051, rel=0.01
    )  # U_N = 0.051 U_D, appendix A


def repeats(loss: Callable[[float, float, float], float]) -> None:
    """The two examples that the authors print (huggingface/datablations README), to the digit."""
    assert loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, rel=1e-12)
    assert loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, rel=1e-12)


def test_repeated_tokens_lose_what_the_authors_program_says():
    law = scaling.law("muennighoff")
    repeats(lambda n, d, u: scaling.loss(law, n, d, u))
    broken(repeats, lambda n, d, _: scaling.loss(law, n, d))
    broken(
        repeats,
        lambda n, d, u: scaling.loss(law, n, scaling.effective(u, d, scaling.repetition().tokens)),
    )
    point = scaling.optimum(law, 6 * 8.67e9 * 178e9, 25e9)
    assert (point.tokens / 1e9, point.parameters / 1e9) == pytest.approx((227, 6.8), rel=0.01)


def test_what_is_seen_once_is_whole_and_what_is_seen_for_ever_has_a_limit():
    worth = scaling.repetition().tokens
    assert scaling.effective(5e9, 2e9, worth) == 2e9 and scaling.effective(5e9, 5e9, worth) == 5e9
    assert scaling.effective(1.0, 1 + worth, worth) == pytest.approx(1 + worth * (1 - 1 / math.e))
    assert scaling.effective(1.0, 1e6, worth) == pytest.approx(1 + worth)
    seen = [scaling.effective(1.0, total, worth) for total in (1.0, 2.0, 4.0, 16.0, 60.0)]
    assert seen == sorted(seen) and all(
        part <= total for part, total in zip(seen, (1.0, 2.0, 4.0, 16.0, 60.0), strict=True)
    )


# Runs whose MFU, tokens and duration are known together: hours of all GPUs at once.
RUNS = [
    ("a100", "8", "0.60", "gpt2_127m", 9.9e9, 94 / 60),
    ("h100", "8", "0.487", "gpt2_1_5b", 33.6e9, 24.9),
    ("h200", "1", "0.41", "gpt2_127m", 10e9, 5.9),
    ("h200", "1", "0.50", "gpt2_1_5b", 33.6e9, 194.0),
]


@pytest.mark.parametrize(("gpu", "devices", "mfu", "name", "tokens", "hours"), RUNS)
def test_the_hours_are_those_of_known_runs(
    gpu: str, devices: str, mfu: str, name: str, tokens: float, hours: float
):
    estimate = estimates.training_estimate(
        cluster(gpu, devices, mfu), reader.model(name), tokens, 1024, None
    )
    assert estimate.hours == pytest.approx(hours, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_for_hours_and_hours_for_tokens_are_each_others_inverse(name: str):
    model, h200s = reader.model(name), cluster("h200", "8")
    tokens = estimates.affordable(h200s, model, 24.0, 1024)
    estimate = estimates.training_estimate(h200s, model, tokens, 1024, 1e9)
    assert estimate.hours == pytest.approx(24.0) and estimate.epochs == pytest.approx(tokens / 1e9)
    assert estimate.price == pytest.approx(24 * 8 * 3.5) and h200s.cost(2.0) == 56.0
    used = tokens * flops.model_flops(model, 1024, "palm")
    assert (
        used
        == pytest.approx(estimates.operations(h200s, 24.0))
        == pytest.approx(8 * 24 * 3600 * 0.4 * 989e12)
    )


def test_memory_is_the_state_of_every_parameter_and_shrinks_in_parts():
    model = reader.model("llama2_7b")
    one, eight = (
        estimates.training_memory(cluster("h100", devices), model, 1024) for devices in ("1", "8")
    )
    assert one["whole_bytes"] == eight["whole_bytes"] > 16 * model.parameters
    assert (
        one["parts_bytes"] == one["whole_bytes"] and eight["parts_bytes"] < one["whole_bytes"] / 7
    )
    assert (one["fits"], eight["fits"]) == ("no", "parts")
    assert estimates.training_memory(cluster(), reader.model("gpt2_127m"), 1024)["fits"] == "whole"
    unknown = dataclasses.replace(cluster(), memory_bytes=None)
    assert estimates.training_memory(unknown, model, 1024)["fits"] is None


def test_the_nearest_model_is_the_one_whose_size_is_the_fewest_times_away():
    models = estimates.catalogue_models()
    for compute, name in ((2.73e20, "gpt2_1_5b"), (5e18, "gpt2_127m")):
        optima = estimates.optima(compute, models, None)
        assert {optimum.nearest for optimum in optima} == {name}


@pytest.mark.parametrize("name", ["hoffmann", "besiroglu", "muennighoff", "repetition"])
def test_every_constant_says_where_it_was_read(name: str):
    constants = scaling.repetition() if name == "repetition" else scaling.law(name)
    assert "arXiv" in constants.source and constants.read in ("paper", "code", "second-hand")
    entry = reader.entries("scaling")[name]
    missing = {key: value for key, value in entry.items() if key != "read"}
    with pytest.raises(UsageError):
        scaling.build(type(constants), {"name": name, **missing}, "scaling")


def answer(
    place: Place, capsys: pytest.CaptureFixture[str], **options: Any
) -> tuple[str, dict[str, Any]]:
    """What is printed, and the JSON that is kept."""
    budget_of(place, checked_request(**options)).show()
    folder = place.store.results / "budget"
    printed = capsys.readouterr().out
    (path,) = [path for path in folder.glob("*.json") if str(path.with_suffix("")) in printed]
    assert {file.suffix for file in folder.glob(f"{path.stem}.*")} == {".json", ".svg", ".png"}
    return printed, json.loads(path.read_text())


def test_hours_are_answered_with_every_law_and_every_model(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    printed, values = answer(place, capsys, gpu="h200", gpus="8", hours="24")
    assert (
        printed.startswith("8 x NVIDIA H200 SXM 141 GB for 24 h: 2.73e+20 operations")
        and "672 USD" in printed
    )
    assert all(f"\n  {name} " in printed for name in MODELS)
    assert "Besiroglu*" in printed and "(read: second-hand)" in printed and "Hoffmann " in printed
    assert [optimum["law"] for optimum in values["best"]] == [law.name for law in LAWS]
    assert [estimate["model"] for estimate in values["plans"]] == list(MODELS)
    assert {source["read"] for source in values["sources"].values()} == {
        "paper",
        "code",
        "second-hand",
    }
    first = {path.name: path.read_bytes() for path in (place.store.results / "budget").iterdir()}
    answer(place, capsys, gpu="h200", gpus="8", hours="24")
    assert {
        path.name: path.read_bytes() for path in (place.store.results / "budget").iterdir()
    } == first


def test_a_model_and_tokens_are_answered_with_hours_price_and_memory(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    options = {
        "gpu": "h100",
        "gpus": "8",
        "mfu": "0.487",
        "model": "gpt2_1_5b",
        "tokens": "33.6e9",
        "unique_tokens": "9e9",
    }
    printed, values = answer(place, capsys, **options)
    assert (
        "24.89 h" in printed
        and "597 USD" in printed
        and "25.6 GB whole" in printed
        and "it fits one device" in printed
    )
    assert "Repeated tokens: arXiv 2305.16264" in printed and values["plans"][0][
        "epochs"
    ] == pytest.approx(33.6 / 9)
    assert values["memory"]["fits"] == "whole"


def test_a_measured_rate_takes_the_place_of_a_peak_only_when_it_is_asked_for(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def never() -> Rate:
        raise AssertionError("measured without being asked")

    monkeypatch.setattr("finrepro.budgeting.command.at_hand", never)
    answer(place, capsys, gpu="h100", hours="1")
    monkeypatch.setattr(
        "finrepro.budgeting.command.at_hand",
        lambda: Rate(7e14, (4096, 4096, 4096), "Some card", "bfloat16"),
    )
    printed, values = answer(place, capsys, measure=True, hours="1", mfu="0.5", price="2")
    assert "1 x Some card for 1 h: 1.26e+18 operations" in printed and "2 USD at 2.00" in printed
    assert "Measured here: 700 TFLOP/s at 4096x4096x4096 in bfloat16" in printed
    assert values["machine"]["peak"] == 7e14


def test_an_mfu_that_no_matrix_product_reaches_is_called_so():
    remarks = {
        mfu: " ".join(checked_request(gpu="h100", hours="1", mfu=mfu).remarks)
        for mfu in ("0.8", "0.81")
    }
    assert (
        "out of reach" not in remarks["0.8"]
        and "out of reach: single matrix products were measured at 0.80" in remarks["0.81"]
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "gpu": ({"gpu": "h20", "hours": "1"}, "unknown GPU 'h20'. Did you mean 'h200'?"),
    "no gpu": ({"hours": "1"}, "give --gpu, one of: a100, h100, h200, a5000; or --measure"),
    "both devices": ({"gpu": "h100", "measure": True, "hours": "1"}, "give --gpu"),
    "a gpu without a peak": (
        {"gpu": "a5000", "hours": "1"},
        "hardware.a5000.peak_bf16: no source was read",
    ),
    "gpus": (
        {"gpu": "h100", "gpus": "0", "hours": "1"},
        "--gpus '0': expected a whole number from 1",
    ),
    "hours": ({"gpu": "h100", "hours": "0"}, "--hours '0': expected a number above 0"),
    "hours in words": ({"gpu": "h100", "hours": "a day"}, "--hours 'a day'"),
    "hours without end": ({"gpu": "h100", "hours": "inf"}, "--hours 'inf'"),
    "hours that are none": ({"gpu": "h100", "hours": "nan"}, "--hours 'nan'"),
    "mfu": (
        {"gpu": "h100", "hours": "1", "mfu": "40"},
        "--mfu '40': expected a number above 0 and at most 1",
    ),
    "nothing": ({"gpu": "h100"}, "give --hours, or --model and --tokens"),
    "both": (
        {"gpu": "h100", "hours": "1", "model": "gpt2_1_5b", "tokens": "1e9"},
        "give --hours, or --model and --tokens",
    ),
    "tokens alone": ({"gpu": "h100", "tokens": "1e9"}, "--tokens needs --model"),
    "model": (
        {"gpu": "h100", "hours": "1", "model": "gpt2_1.5b"},
        "unknown model 'gpt2_1.5b'. Did you mean 'gpt2_1_5b'?",
    ),
    "a miniature": (
        {"gpu": "h100", "hours": "1", "model": "gpt2_127m_mini"},
        "Did you mean 'gpt2_127m'?",
    ),
    "sequence": (
        {"gpu": "h100", "hours": "1", "model": "gpt2_127m", "sequence": "2048"},
        "gpt2_127m has 1024 positions",
    ),
    "tokens": ({"gpu": "h100", "model": "gpt2_127m", "tokens": "-1"}, "--tokens '-1'"),
    "unique": ({"gpu": "h100", "hours": "1", "unique_tokens": "few"}, "--unique-tokens 'few'"),
    "price": ({"gpu": "h100", "hours": "1", "price": "free"}, "--price 'free'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_line(case: str):
    options, expected = WRONG[case]
    with pytest.raises(UsageError) as raised:
        checked_request(**options)
    assert expected in one_line(raised.value)
