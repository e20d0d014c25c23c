"""AdaLoRA: its numbers against NumPy, its schedule, what it measures and takes away in training,
on every engine and on two ranks; what it refuses; and that plain PEFT reads what is left."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adalora_program as program
import numpy as np
import pytest
import torch
from adalora_program import STEPS, settings, spec
from fixtures.model import (
    MINIATURES,
    all_logits,
    answer_log_likelihood,
    assert_close,
    broken,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
)
from fixtures.planted import plant
from fixtures.process import PROGRAMS, on_ranks
from safetensors.torch import load_file

from finrepro.catalogue import reader
from finrepro.catalogue.compatibility import refusal
from finrepro.data.batches import COLLATE
from finrepro.errors import Interrupted, UsageError
from finrepro.methods.adapters import adalora
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.methods.layers.triplets import Allocation, mean_distance
from finrepro.models.build import configuration, load
from finrepro.runtime import process as runtime
from finrepro.settings import build
from finrepro.training.engine_view import EngineView

IDS = tuple(random_examples(11, count=1, longest=30)[0].ids) * 3
LAYERS = 14  # of the tiny Llama
both = pytest.mark.parametrize("name", MINIATURES)
one_by_default = pytest.mark.parametrize(
    "name", [pytest.param(MINIATURES[0], marks=pytest.mark.slow), MINIATURES[1]]
)


def trained(cell: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    return program.run(cell, folder, **options)


# --- the schedule


def closed_form(taken: int, first: int, last: int, start: int, end: int) -> int:
    """Section 3.3: b(t), clipped to the phase in which it falls."""
    progress = np.clip((taken - first) / (last - first), 0, 1)
    return int(np.floor(end + (start - end) * (1 - progress) ** 3 + 1e-9))


def follows_the_closed_form(
    config: Any, max_steps: int, first: int, last: int, budget: Callable[..., int] = adalora.budget
) -> None:
    found = [budget(config, LAYERS, taken, max_steps) for taken in range(max_steps + 1)]
    start, end = config.init_r * LAYERS, config.target_r * LAYERS
    assert found == [closed_form(taken, first, last, start, end) for taken in range(max_steps + 1)]
    assert found[0] == start and set(found[last:]) == {end}
    assert sorted(found, reverse=True) == found and len(set(found)) > 3


def test_the_budget_falls_by_a_cubic_and_ends_at_the_target() -> None:
    entry = reader.adapter("adalora_r8").config
    follows_the_closed_form(entry, 536, 54, 268)  # shares of the steps
    follows_the_closed_form(settings(tinit=10, tfinal=20).config, 100, 10, 80)

    def printed(config: Any, layers: int, taken: int, max_steps: int) -> int:
        """Mutant: equation 12 as it is printed, which subtracts tfinal as well."""
        return adalora.budget(
            config, layers, max(taken - 20, 0) if taken < 80 else taken, max_steps
        )

    broken(follows_the_closed_form, settings(tinit=10, tfinal=20).config, 100, 10, 80, printed)


@pytest.mark.parametrize(
    ("changes", "steps", "refused"),
    [
        ({"tinit": 1, "tfinal": 3}, 5, False),
        ({"tinit": 1, "tfinal": 3}, 4, True),
        ({"tinit": 0, "tfinal": 0}, 1, False),
        ({"tinit": 0.5, "tfinal": 0.5}, 40, True),
        ({"tinit": 0.1, "tfinal": 0.5}, 20, False),
    ],
)
def test_a_schedule_without_a_step_to_prune_in_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], steps: int, refused: bool, tmp_path: Path
) -> None:
    cell = spec(adapter=settings(**changes), max_steps=steps)
    reason = refusal(cell)
    assert (reason is not None) is refused
    if reason:
        assert "\n" not in reason and f"none of {steps} steps to prune in" in reason
        with pytest.raises(ValueError, match="steps to prune in"):
            trained(cell, tmp_path)


def test_settings_that_cannot_be_are_refused_when_they_are_read() -> None:
    good = dataclasses.asdict(reader.adapter("adalora_r8").config)
    wrong: tuple[dict[str, Any], ...] = (
        {"target_r": 13},
        {"init_r": 0},
        {"target_r": 0},
        {"deltaT": 0},
        {"tinit": -1},
        {"tfinal": 1.5},
        {"beta1": 1.0},
        {"beta2": 0.0},
        {"orth_reg_weight": -0.1},
        {"lora_dropout": 1.0},
        {"r": 8},
    )
    for change in wrong:
        with pytest.raises(UsageError, match=r"^adapters\.x[.:][^\n]*$"):
            build(adalora.Config, good | change, "adapters.x")
    with pytest.raises(UsageError, match="target_r 13 is more than init_r 12"):
        build(adalora.Config, good | {"target_r": 13}, "adapters.x")
    reason = refusal(spec(adapter=settings(init_r=40)))
    assert reason is not None and reason.startswith("rank 40 is more than") and "k_proj" in reason


# --- numbers


def regulariser(weights: dict[str, torch.Tensor], weight: float) -> float:
    """gamma (||P^T P - I|| + ||Q Q^T - I||) with Frobenius norms, the mean over all matrices, in
    NumPy.
    """
    found = []
    for name, tensor in weights.items():
        value = tensor.detach().double().numpy()
        if "lora_E" not in name:
            square = value.T @ value if "lora_B" in name else value @ value.T
            found.append(np.sqrt(((square - np.eye(len(square))) ** 2).sum()))
    return float(weight * np.mean(found))


def named(model: Any) -> dict[str, Any]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def is_the_regulariser(model: Any, config: Any, loss: Callable[..., Any]) -> None:
    assert float(loss(model, config).detach()) == pytest.approx(
        regulariser(named(model), config.orth_reg_weight), rel=1e-5
    )


@both
def test_the_regulariser_is_numpys(name: str) -> None:
    model, config = stir(make(spec(name)).model), settings().config
    is_the_regulariser(model, config, adalora.extra_loss)
    pairs = [
        (model.get_parameter(each["P"]), model.get_parameter(each["Q"]))
        for each in adalora.layers_of(model).values()
    ]
    broken(
        is_the_regulariser,
        model,
        config,
        lambda *_: config.orth_reg_weight * mean_distance(pairs) ** 2,
    )
    broken(
        is_the_regulariser,
        model,
        config,
        lambda *_: config.orth_reg_weight * mean_distance(pairs[1:]),
    )


@one_by_default
def test_the_regulariser_is_in_no_loss_that_is_recorded_or_evaluated(
    name: str, tmp_path: Path
) -> None:
    """Recorded: the first loss is the same however much it weighs, the third is not. Evaluated:
    the likelihood; PEFT's own adds it.
    """
    light, heavy = (
        trained(spec(name, adapter=settings(orth_reg_weight=weight)), tmp_path / str(weight))[1][
            "losses"
        ]
        for weight in (0.0, 100.0)
    )
    assert light[0] == heavy[0] and light[2] != heavy[2]
    model, example = stir(make(spec(name)).model), random_examples(0, count=1, longest=30)[0]
    plain = -answer_log_likelihood(model, example)
    with torch.no_grad():
        assert_close(SupervisedLM(model, None).eval()(COLLATE["padded"]([example])), plain)
        labels = torch.tensor([example.ids]).clone()
        labels[:, : example.answer_start] = -100
        with_peft = model(
            input_ids=torch.tensor([example.ids]), labels=labels, use_cache=False
        ).loss
    mean = float(plain.detach()) / example.num_supervised
    assert float(with_peft) == pytest.approx(
        mean + regulariser(named(model), settings().config.orth_reg_weight), rel=1e-4
    )


class Numbers:
    """The importance in NumPy, in double precision, from what the view read: equations 7 to
    11.
    """

    def __init__(self, config: Any) -> None:
        self.config, self.mean, self.spread = config, {}, {}

    def measure(self, name: str, value: np.ndarray, gradient: np.ndarray) -> None:
        now = np.abs(value * gradient)
        mean = self.config.beta1 * self.mean.get(name, 0.0) + (1 - self.config.beta1) * now
        self.spread[name] = self.config.beta2 * self.spread.get(name, 0.0) + (
            1 - self.config.beta2
        ) * np.abs(now - mean)
        self.mean[name] = mean

    def best(self, count: int) -> set[tuple[str, int]]:
        scores: dict[tuple[str, int], float] = {}
        for name in self.mean:
            if "lora_E" in name:
                s = {
                    part: self.mean[n] * self.spread[n]
                    for part in "BEA"
                    for n in [name.replace("lora_E", f"lora_{part}")]
                }
                for k in range(len(s["E"])):
                    scores[name, k] = s["E"][k, 0] + s["B"][:, k].mean() + s["A"][k].mean()
        return set(sorted(scores, key=scores.__getitem__, reverse=True)[:count])


def watched(cell: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Any]:
    """(steps taken, NumPy's choice, the method's choice, which Lambdas are not zero) of every
    step, and the model.
    """
    numbers, seen = Numbers(cell.adapter.config), []
    before, after = adalora.before_step, adalora.after_step

    def read(view: EngineView, config: Any, step: int, max_steps: int) -> None:
        for name, parameter in view.trained.items():
            numbers.measure(
                name,
                view.value(parameter).double().numpy(),
                view.gradient(parameter).double().numpy(),
            )
        before(view, config, step, max_steps)

    def compare(view: EngineView, config: Any, step: int, max_steps: int) -> None:
        after(view, config, step, max_steps)
        budget = adalora.budget(config, LAYERS, step + 1, max_steps)
        allocation: Allocation = view.model.allocation
        kept = {
            (f"{name}.lora_E.default", k)
            for name, each in allocation.masks.items()
            for k in each.nonzero().flatten().tolist()
        }
        lambdas = {
            (n, k)
            for n, p in view.trained.items()
            if "lora_E" in n
            for k in view.value(p)[:, 0].nonzero().flatten().tolist()
        }
        seen.append([step + 1, numbers.best(budget), kept, lambdas])

    monkeypatch.setattr(adalora, "before_step", read)
    monkeypatch.setattr(adalora, "after_step", compare)
    return seen, trained(cell, folder)[0]


def chooses_as_numpy(cell: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After steps 2, 4, 6 and 7 of ten; the Lambda of the rest is zero then, may grow in
    between, and never does after the last choice.
    """
    seen, _ = watched(cell, folder, monkeypatch)
    everything = 4 * LAYERS
    assert [row[0] for row in seen] == list(range(1, STEPS + 1))
    for taken, right, kept, lambdas in seen:
        if taken in (2, 4, 6, 7):
            assert kept == right and len(kept) == adalora.budget(
                cell.adapter.config, LAYERS, taken, STEPS
            )
            assert lambdas == kept
        elif taken < 7:
            assert len(lambdas) == everything
        else:
            assert kept == seen[6][2] == lambdas and len(kept) == 2 * LAYERS


def test_it_takes_away_what_numpy_takes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chooses_as_numpy(spec(), tmp_path, monkeypatch)


def test_the_law_finds_another_score_and_a_regrown_triplet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean_only(self: Allocation, layer: dict[str, str]) -> torch.Tensor:
        """Mutant: the smoothed importance without its uncertainty."""
        means = {part: self.averages[name][0] for part, name in layer.items()}
        return means["E"].flatten() + means["P"].mean(0) + means["Q"].mean(1)

    with monkeypatch.context() as patch:
        patch.setattr(Allocation, "scores", mean_only)
        broken(chooses_as_numpy, spec(), tmp_path / "scores", patch)
    with monkeypatch.context() as patch:
        patch.setattr(EngineView, "set", lambda *_: None)
        broken(chooses_as_numpy, spec(), tmp_path / "set", patch)


@pytest.mark.slow
def test_a_step_that_is_cut_into_smaller_batches_measures_the_same(tmp_path: Path) -> None:
    """The gradient is the whole global batch's."""
    (_, one), (_, many) = (
        trained(spec(max_tokens=size), tmp_path / str(size)) for size in (512, 40)
    )
    assert same_choice(one, many)
    assert one["losses"] == pytest.approx(many["losses"], rel=1e-5)


def same_choice(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one["kept"] and one["kept"].keys() == other["kept"].keys()
    return all(torch.equal(mask, other["kept"][name]) for name, mask in one["kept"].items())


@pytest.mark.parametrize("forgotten", ["before_step", "after_step"])
def test_a_loop_that_forgets_one_of_the_two_calls_is_told_so(
    forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(view: Any, config: Any, step: int, max_steps: int) -> None: ...

    plant(monkeypatch, adalora, **{forgotten: nothing})
    with pytest.raises(
        RuntimeError,
        match=r"AdaLoRA is (at step 1, and has allocated after 0|"
        r"after step 0, and has measured 0) steps",
    ):
        trained(spec(), tmp_path)


# --- resuming, engines, ranks


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["losses"] == other["losses"] and same_choice(one, other)
    assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())


def cut(cell: Any, folder: Path, after: int) -> dict[str, Any]:
    """Stopped after some steps, and resumed with other generators."""
    seen: list[Any] = []
    with pytest.raises(Interrupted):
        trained(cell, folder, stop=lambda: len(seen) >= after, seen=seen)
    runtime.setup(123, 2)
    return trained(cell, folder)[1]


@pytest.mark.parametrize(
    ("engine", "stage", "after"),
    [
        ("ddp", 0, 5),
        pytest.param("ddp", 0, 8, marks=pytest.mark.slow),
        *(pytest.param("deepspeed", stage, 5, marks=pytest.mark.slow) for stage in (2, 3)),
    ],
)
def test_a_run_resumed_within_the_schedule_ends_like_a_whole_one(
    engine: Any, stage: int, after: int, tmp_path: Path
) -> None:
    cell = spec(engine=engine, stage=stage)
    same_bits(cut(cell, tmp_path / "cut", after), trained(cell, tmp_path / "whole")[1])


@pytest.mark.slow
def test_the_law_finds_a_resumed_run_without_its_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(spec(), tmp_path / "whole")[1]
    known = Allocation.load

    def without(self: Allocation, state: dict[str, Any], devices: Any) -> None:
        known(self, state | {"averages": {}}, devices)

    monkeypatch.setattr(Allocation, "load", without)
    broken(same_bits, cut(spec(), tmp_path / "cut", 5), whole)


@pytest.mark.slow
def test_two_ranks_take_away_the_triplets_of_one_on_every_engine(tmp_path: Path) -> None:
    on_ranks(PROGRAMS / "adalora_program.py", tmp_path)
    first, second = (torch.load(tmp_path / f"2-{rank}.pt", weights_only=False) for rank in (0, 1))
    one = {name: trained(spec(quantizer=name), tmp_path / name)[1] for name in ("none", "nf4")}
    for key in program.CELLS:
        right = one[key[2]]
        for mine in (first[key], second[key]):
            assert (
                mine["losses"] == pytest.approx(right["losses"], rel=1e-5)
                and mine["tokens"] == right["tokens"]
            )
            assert same_choice(mine, right)
            for name, value in mine["weights"].items():
                if value.numel():  # at ZeRO-3 they are collected on the first of several ranks
                    assert (value - right["weights"][name]).norm() <= 1e-3 * right["weights"][
                        name
                    ].norm(), name
    assert not same_choice(one["none"], one["nf4"]), "cells that are all alike prove nothing"


# --- what is exported


def is_read_back(model: Any, cell: Any, folder: Path) -> None:
    import peft

    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(load(cell, None), folder)
        assert torch.equal(all_logits(again.eval(), IDS), all_logits(model.eval(), IDS))


@both
def test_plain_peft_reads_what_is_left_and_what_is_taken_away_is_zero(
    name: str, tmp_path: Path
) -> None:
    cell = spec(name)
    model, found = trained(cell, tmp_path / "run")
    adalora.export(model, tmp_path)
    left = {f"{layer}.lora_E": kept for layer, kept in found["kept"].items()}
    assert (
        sum(int(each.sum()) for each in left.values()) == 2 * len(left)
        and len({int(each.sum()) for each in left.values()}) > 2
    )
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (told["peft_type"], told["tinit"], told["tfinal"], told["total_step"]) == (
        "ADALORA",
        1,
        3,
        STEPS,
    )
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in written if "lora_E" in key} == set(left)
    assert all(torch.equal(written[key][:, 0] != 0, kept) for key, kept in left.items())
    is_read_back(model, cell, tmp_path)
    broken(is_read_back, stir(model), cell, tmp_path)


@both
def test_it_starts_as_the_paper_says(name: str) -> None:
    """Lambda is zero, P and Q have a standard deviation of 0.02; so only Lambda has a first
    gradient.
    """
    model = make(spec_of(name, "adalora_r8")).model
    answer_log_likelihood(model, random_examples(0, count=1)[0]).backward()
    for key, parameter in named(model).items():
        assert bool(parameter.grad.any()) is ("lora_E" in key), key
    drawn = torch.cat(
        [each.detach().flatten() for key, each in named(model).items() if "lora_E" not in key]
    )
    assert abs(float(drawn.std()) / 0.02 - 1) < 0.02 and abs(float(drawn.mean())) < 1e-3
    assert not any(each.any() for key, each in named(model).items() if "lora_E" in key)


# Modules, LoRA parameters a unit of rank
COUNTS = {
    "gpt2_127m": (48, 147_456),
    "gpt2_1_5b": (192, 1_228_800),
    "llama2_7b": (224, 2_498_560),
    "llama2_13b": (280, 3_911_680),
    "llama3_1_8b": (224, 2_621_440),
    "llama3_1_70b": (560, 12_943_360),
}


@pytest.mark.parametrize("name", COUNTS)
def test_it_counts_on_the_real_models_as_in_the_table(name: str) -> None:
    from transformers import AutoModelForCausalLM

    choice, entry = reader.adapter("adalora_r8"), reader.model(name)
    modules, per_rank = COUNTS[name]
    assert adalora.trainable_parameters(entry, choice.config) == 12 * (per_rank + modules)
    if entry.architecture.get("n_layer") == 12:
        with torch.device("meta"):
            model = adalora.apply(
                AutoModelForCausalLM.from_config(configuration(entry)), choice.config, 0
            )
        assert sum(each.numel() for each in named(model).values()) == 12 * (per_rank + modules)


def test_a_layer_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="named c_attn; there are"):
        make(spec(adapter=settings(target_modules=("c_attn",))))
