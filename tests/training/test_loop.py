"""The training loop: every ZeRO stage and layout computes what a plain loop computes, and an
interrupted run ends like a whole one.
"""

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.process import on_ranks

from finrepro.catalogue import reader
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec
from finrepro.data import packing
from finrepro.data.batches import COLLATE
from finrepro.data.tokens import Encoded
from finrepro.errors import Diverged, Interrupted, UsageError
from finrepro.evidence.files import read_lines
from finrepro.evidence.place import Place
from finrepro.evidence.store import open_store
from finrepro.kinds import optimizer_of
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.models.build import build
from finrepro.running.launch import command
from finrepro.runtime import process
from finrepro.runtime import ranks as ranks_runtime
from finrepro.training.checkpoint import Control
from finrepro.training.engines.deepspeed import is_sharded
from finrepro.training.loop import train
from finrepro.training.progress import Trained
from finrepro.training.schedule import learning_rate
from finrepro.training.steps import steps_from

CPU = torch.device("cpu")
STEPS = 5


@pytest.fixture(autouse=True)
def _setup() -> None:
    process.quiet_environment()
    process.setup(0, 2)


@pytest.fixture(scope="module")
def data() -> list[Encoded]:
    return sequences()


def sequences() -> list[Encoded]:
    """Sixty sequences of 4 to 24 random tokens with answers of one to three."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, 25, size=60)
    return [
        Encoded(
            tuple(generator.integers(2, 2048, size=n).tolist()), int(n - generator.integers(1, 4))
        )
        for n in lengths
    ]


def spec_of(pattern: str, **train_settings: Any) -> RunSpec:
    """A smoke cell with a few steps of eight examples."""
    spec = expand(Selection("3", only=pattern, weights="random"), "smoke")[0].spec
    few = {
        "max_steps": STEPS,
        "warmup_steps": 2,
        "global_batch_size": 8,
        "sort_window": 2,
        "max_tokens": 96,
    }
    return dataclasses.replace(spec, train=dataclasses.replace(spec.train, **few | train_settings))


def control(
    folder: Path, stop: Callable[[], bool] = lambda: False, seen: list[Any] | None = None
) -> Control:
    return Control((seen if seen is not None else []).append, stop, folder, checkpoint_seconds=1e9)


def run(
    spec: RunSpec, data: Sequence[Encoded], folder: Path, **options: Any
) -> tuple[list[float], dict[str, Any]]:
    """Losses, and final trainable weights; the gradient's norms have to be there."""
    built = build(spec, None, CPU)
    trained = train(built.model, data, spec, CPU, control(folder, **options))
    assert all(0 < row["grad_norm"] < math.inf for row in trained.losses)
    return [row["loss"] for row in trained.losses], trainable(built.model)


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_loop(
    spec: RunSpec, data: Sequence[Encoded]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same arithmetic without DeepSpeed: one example a forward pass, summed gradients,
    torch's own clipping.
    """
    model = build(spec, None, CPU).model
    lm = SupervisedLM(model)
    settings = spec.train
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = optimizer_of(settings.optimizer).build(named, settings.lr)
    losses = []
    for step, rows in steps_from(0, [len(e.ids) for e in data], settings, spec.seed):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        supervised = sum(data[row].num_supervised for row in rows)
        loss = sum(lm(COLLATE["padded"]([data[row]])) for row in rows) / supervised
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], settings.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, trainable(model)


ENGINES = (("deepspeed", 0), ("deepspeed", 2), ("ddp", 0))
CELLS = ("gpt2*-none-full-tfns-*", "llama*-none-lora_r8-tfns-*", "gpt2*-nf4-lora_r8-tfns-*")


@pytest.mark.parametrize(
    ("engine", "zero_stage"), [*(("deepspeed", stage) for stage in range(4)), ("ddp", 0)]
)
@pytest.mark.parametrize("pattern", CELLS)
def test_every_engine_and_zero_stage_equals_a_plain_loop(
    pattern: str, engine: Any, zero_stage: int, data: list[Encoded], tmp_path: Path
) -> None:
    spec = spec_of(pattern, zero_stage=zero_stage, engine=engine)
    losses, weights = run(spec, data, tmp_path)
    expected, reference = plain_loop(spec, data)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name, value in reference.items():
        # In norm: where a gradient is all but zero, Adam turns rounding into a step of either sign.
        assert (weights[name] - value).norm() < 1e-3 * value.norm(), name
    assert len(set(losses)) == STEPS, "a loss that never changes proves nothing"


@pytest.mark.parametrize("pattern", CELLS[:2])
def test_layout_and_micro_batch_size_change_nothing(
    pattern: str, data: list[Encoded], tmp_path: Path
) -> None:
    reference, _ = run(spec_of(pattern), data, tmp_path)
    for changes in ({"layout": "bins"}, {"max_tokens": 24}, {"layout": "bins", "max_tokens": 30}):
        losses, _ = run(spec_of(pattern, **changes), data, tmp_path)
        np.testing.assert_allclose(losses, reference, rtol=1e-5, err_msg=str(changes))


def test_activation_checkpointing_changes_nothing(data: list[Encoded], tmp_path: Path) -> None:
    reference, _ = run(spec_of(CELLS[1]), data, tmp_path)
    losses, _ = run(spec_of(CELLS[1], activation_checkpointing=True), data, tmp_path)
    np.testing.assert_allclose(losses, reference, rtol=1e-6)


@pytest.mark.parametrize(("engine", "zero_stage"), ENGINES)
@pytest.mark.parametrize("pattern", CELLS)
def test_a_resumed_run_ends_bit_for_bit_like_a_whole_one(
    pattern: str, engine: Any, zero_stage: int, data: list[Encoded], tmp_path: Path
) -> None:
    spec = spec_of(pattern, zero_stage=zero_stage, engine=engine)
    whole, weights = run(spec, data, tmp_path / "whole")
    seen: list[Any] = []
    with pytest.raises(Interrupted, match="checkpoint"):
        run(spec, data, tmp_path / "cut", stop=lambda: len(seen) >= 2, seen=seen)
    assert len(seen) == 2
    process.setup(123, 2)  # another process would start from other generator states
    resumed, resumed_weights = run(spec, data, tmp_path / "cut")
    assert resumed == whole
    for name, value in weights.items():
        assert torch.equal(resumed_weights[name], value), name


def test_the_same_cell_twice_gives_the_same_bits(data: list[Encoded], tmp_path: Path) -> None:
    spec = spec_of(CELLS[2])
    first, weights = run(spec, data, tmp_path)
    process.setup(7, 2)
    torch.rand(5)  # what a library drew before must not matter
    second, again = run(spec, data, tmp_path)
    assert first == second
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_only_trainable_weights_move(data: list[Encoded], tmp_path: Path) -> None:
    spec = spec_of(CELLS[1])
    built = build(spec, None, CPU)
    frozen = {
        name: p.detach().clone()
        for name, p in built.model.named_parameters()
        if not p.requires_grad
    }
    before = trainable(built.model)
    train(built.model, data, spec, CPU, control(tmp_path))
    after = dict(built.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_a_loss_that_is_not_a_number_ends_the_run_and_says_at_which_step(
    data: list[Encoded], tmp_path: Path
) -> None:
    built = build(spec_of(CELLS[0]), None, CPU)
    next(iter(built.model.parameters())).data[:] = math.inf
    with pytest.raises(Diverged, match="diverged at step 0"):
        train(built.model, data, spec_of(CELLS[0]), CPU, control(tmp_path))


@pytest.mark.parametrize(("engine", "zero_stage"), ENGINES)
def test_a_gradient_that_is_not_a_number_is_seen_in_the_very_step(
    engine: Any, zero_stage: int, data: list[Encoded], tmp_path: Path
) -> None:
    """The loss of the last step is still finite when its gradient is not: nothing but the norm
    can tell.
    """
    spec = spec_of(CELLS[0], zero_stage=zero_stage, engine=engine, max_steps=1)
    built = build(spec, None, CPU)
    weight = next(p for p in built.model.parameters() if p.ndim >= 2)
    weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(Diverged, match=r"loss \d.*gradient norm (nan|inf)"):
        train(built.model, data, spec, CPU, control(tmp_path))


@pytest.mark.parametrize("pattern", CELLS)
def test_nothing_is_trained_in_no_steps(pattern: str, tmp_path: Path) -> None:
    spec = spec_of(pattern, max_steps=0)
    built = build(spec, None, CPU)
    built.model.requires_grad_(False)  # an engine would have nothing to optimize
    before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    assert train(built.model, [], spec, CPU, control(tmp_path)) == Trained()
    assert all(torch.equal(p, before[name]) for name, p in built.model.named_parameters())


def test_one_rank_is_left_with_a_whole_model_after_zero_3(
    data: list[Encoded], tmp_path: Path
) -> None:
    spec = spec_of(CELLS[1], zero_stage=3)
    model = build(spec, None, CPU).model
    shapes = {name: p.shape for name, p in model.named_parameters()}
    train(model, data, spec, CPU, control(tmp_path))
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert not is_sharded(model) and not any(
        key.startswith("ds_") for p in model.parameters() for key in vars(p)
    )


def test_plain_ddp_refuses_to_train_bfloat16_weights(tmp_path: Path) -> None:
    spec = spec_of(CELLS[0], engine="ddp")
    model = build(spec, None, CPU).model.bfloat16()
    with pytest.raises(UsageError, match=r"^engine 'ddp' trains float32 parameters only: [^\n]*$"):
        train(model, [], spec, CPU, control(tmp_path))


@pytest.mark.parametrize("pattern", CELLS[:2])
def test_the_gradient_norm_is_that_of_the_plain_loop(
    pattern: str, data: list[Encoded], tmp_path: Path
) -> None:
    spec = spec_of(pattern, max_steps=1)
    built = build(spec, None, CPU)
    trained = train(built.model, data, spec, CPU, control(tmp_path))
    model = build(spec, None, CPU).model
    ((_, rows),) = list(steps_from(0, [len(e.ids) for e in data], spec.train, spec.seed))
    supervised = sum(data[row].num_supervised for row in rows)
    (
        sum(SupervisedLM(model)(COLLATE["padded"]([data[row]])) for row in rows) / supervised
    ).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert trained.losses[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_checkpoint_of_another_maker_is_not_resumed(data: list[Encoded], tmp_path: Path) -> None:
    """Source, packages and base decide a run's bits: half a run of each would be neither."""
    spec, seen = spec_of(CELLS[0]), []
    with pytest.raises(Interrupted):
        run(spec, data, tmp_path, stop=lambda: len(seen) >= 2, seen=seen)
    other = dataclasses.replace(control(tmp_path), made_by="other source")
    trained = train(build(spec, None, CPU).model, data, spec, CPU, other)
    assert [row["step"] for row in trained.losses] == list(range(STEPS))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("engine", [pytest.param("deepspeed", marks=pytest.mark.slow), "ddp"])
def test_a_damaged_checkpoint_is_set_aside_and_the_run_starts_anew(
    engine: Any, data: list[Encoded], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit of any of its files, or a file less: it ends as one that was not interrupted."""
    spec, seen = spec_of(CELLS[0], engine=engine), []
    whole, _ = run(spec, data, tmp_path / "whole")
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted):
        run(spec, data, cut, stop=lambda: len(seen) >= 2, seen=seen)
    files = sorted(path.relative_to(cut) for path in cut.rglob("*") if path.is_file())
    assert len(files) == 3, "states, manifest and pointer"
    damages = [(name, flipped) for name in files]
    damages += [(name, Path.unlink) for name in files if name.name != "latest"]
    for number, (name, damage) in enumerate(damages):
        folder = tmp_path / f"run{number}"
        shutil.copytree(cut, folder)
        damage(folder / name)
        assert run(spec, data, folder)[0] == whole, name
        said = capsys.readouterr().err
        assert f"checkpoint was damaged ({name})" in said and said.count("\n") == 1
        aside = tmp_path / f"run{number}.damaged-1"
        assert (aside / name).exists() == (damage is flipped) and str(aside) in said


def test_what_was_set_aside_stands_with_the_result(data: list[Encoded], tmp_path: Path) -> None:
    spec, seen = spec_of(CELLS[0], engine="ddp"), []
    with pytest.raises(Interrupted):
        run(spec, data, tmp_path / "run", stop=lambda: len(seen) >= 2, seen=seen)
    flipped(tmp_path / "run" / "latest")
    trained = train(build(spec, None, CPU).model, data, spec, CPU, control(tmp_path / "run"))
    assert trained.remarks == [
        "its checkpoint was damaged (latest) and was set aside: it started anew"
    ]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_warms_up_and_ends_where_its_schedule_says(schedule: Any) -> None:
    settings = spec_of(CELLS[0], schedule=schedule, max_steps=20, warmup_steps=4, lr=1.0).train
    rates = [learning_rate(step, settings) for step in range(21)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[20] == pytest.approx(1.0 if schedule == "constant" else 0.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_any_step_can_be_reached_without_replaying_those_before_it(data: list[Encoded]) -> None:
    settings = spec_of(CELLS[0], max_steps=30).train
    lengths = [len(example.ids) for example in data]
    whole = list(steps_from(0, lengths, settings, 3))
    assert list(steps_from(17, lengths, settings, 3)) == whole[17:]
    per_epoch = packing.num_steps(len(data), 8, 2)
    assert sorted(row for _, rows in whole[:per_epoch] for row in rows) == list(range(len(data)))


@pytest.mark.slow
def test_two_ranks_equal_one_on_a_real_cell(tmp_path: Path) -> None:
    """TFNS, a miniature with random weights, the command that launchers start: losses of every
    step within 1e-5.
    """
    losses = {}
    for ranks in (1, 2):
        only = "gpt2*-none-full-tfns-*"
        selection = Selection("3", quick=True, only=only, weights="random", world_size=ranks)
        spec = expand(selection, "smoke")[0].spec
        place = Place(open_store(tmp_path / str(ranks)))
        line = command(spec, selection, "smoke", place)
        on_ranks(*line[line.index("finrepro.running.cell") - 1 :], count=ranks)
        result = place.store.result(spec.run_id)
        assert result is not None and result["status"] == "done"
        assert result["scores"] == [], "random weights show no quality"
        losses[ranks] = [
            row["loss"] for row in read_lines(place.store.run_folder(spec.run_id) / "loss.jsonl")
        ]
    assert len(losses[1]) == spec.train.max_steps
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_ranks_equal_one_at_every_zero_stage(
    zero_stage: int, data: list[Encoded], tmp_path: Path
) -> None:
    """The same global batch over two ranks, with an uneven share of examples, against one rank
    at stage 0.
    """
    expected, _ = run(spec_of(CELLS[1]), data, tmp_path)
    on_ranks(Path(__file__), str(zero_stage), tmp_path)
    losses = json.loads((tmp_path / "losses.json").read_text())
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_zero_configurations_exist_for_every_stage() -> None:
    for stage in range(4):
        assert reader.deepspeed_config(stage)["zero_optimization"]["stage"] == stage


def _as_rank(zero_stage: int, folder: Path) -> None:
    """What a rank of the test above runs."""
    process.quiet_environment()
    process.setup(0, 1)
    losses, _ = run(spec_of(CELLS[1], zero_stage=zero_stage), sequences(), folder)
    if ranks_runtime.current().is_main:
        (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    _as_rank(int(sys.argv[1]), Path(sys.argv[2]))
