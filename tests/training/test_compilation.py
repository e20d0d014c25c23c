"""Compiled training computes what training as written computes, says so before the first step, and
leaves nothing behind.

Codes are made here without the last stage ("aot_eager": traced, split into forward and backward,
and run by torch's own kernels), which is exact; the slow tests run torch's own compiler for CPUs.
"""

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.json_schema import result_faults
from fixtures.model import (
    CPU,
    MINIATURES,
    assert_same_gradients,
    broken,
    gradients,
    images,
    make,
    process,
    random_examples,
    spec_of,
    stir,
    tiny,
)
from fixtures.process import on_ranks
from torch._dynamo.utils import counters

from finrepro.catalogue import cells, compatibility
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec
from finrepro.data.batches import COLLATE
from finrepro.errors import CellFailed, Diverged, EnvironmentFault, Interrupted
from finrepro.evidence.place import Place
from finrepro.methods.layers import isolated_attention as attention
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.running import cell as run
from finrepro.running.walk import walk
from finrepro.runtime import process as runtime
from finrepro.runtime import ranks
from finrepro.training import compilation
from finrepro.training.checkpoint import Control
from finrepro.training.loop import train
from finrepro.training.progress import Trained

assert process  # every test here computes
# dynamo looks at the inputs of its graphs
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
STEPS = 4
FEW: dict[str, Any] = {
    "max_steps": STEPS,
    "warmup_steps": 1,
    "global_batch_size": 6,
    "sort_window": 1,
    "max_tokens": 64,
}
# In proportion to the gradient: AdamW's usual epsilon moves by the sign, even where that is
# rounding.
SMOOTH = {"kind": "adamw", "betas": [0.9, 0.999], "eps": 1.0, "weight_decay": 0.0}
METHODS = (("full", "none"), ("lora_r8", "nf4"))
MODES = (
    ("padded", False),
    ("padded", True),
    ("bins", False),
    ("bins", True),
)  # layout, activations computed again


def without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our functions as users have them: the checks of annotations, which the tests put around
    each, are nothing that can be compiled.
    """
    for name, module in sorted(sys.modules.items()):
        if name.startswith("finrepro."):
            classes = [
                each
                for each in vars(module).values()
                if isinstance(each, type) and each.__module__ == name
            ]
            for holder in (module, *classes):
                for key, each in list(vars(holder).items()):
                    if isinstance(each, FunctionType) and "jaxtyping" in each.__code__.co_filename:
                        monkeypatch.setattr(holder, key, inspect.unwrap(each))


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    without_checks(monkeypatch)
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def spec(
    name: str = MINIATURES[0], adapter: str = "lora_r8", quantizer: str = "none", **train: Any
) -> RunSpec:
    return spec_of(
        name,
        adapter,
        quantizer,
        **{"engine": "ddp", "compile": True, "lr": 1.0, "optimizer": SMOOTH, **FEW, **train},
    )


def control(folder: Path, stop: Any = lambda: False) -> Control:
    return Control(lambda _: None, stop, folder, checkpoint_seconds=1e9)


def trained(of: RunSpec, folder: Path, **options: Any) -> tuple[Trained, dict[str, torch.Tensor]]:
    """What a run leaves: losses and proofs, and its trained weights."""
    runtime.setup(0, 2)
    model = make(of).model
    left = train(model, random_examples(0, 30), of, CPU, control(folder, **options))
    return left, {
        name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
    }


def are_the_same_run(one: Trained, other: Trained, rtol: float) -> None:
    """Loss, gradient norm and rate of every step."""
    for key in ("step", "loss", "grad_norm", "lr"):
        np.testing.assert_allclose(
            [s[key] for s in one.losses], [s[key] for s in other.losses], rtol=rtol, err_msg=key
        )
    assert len(one.losses) == STEPS


def is_proven(left: Trained, processes: int = 1) -> None:
    """One proof a process; every rank's differences within the tolerance, and not of nothing."""
    assert len(left.compilation) == processes
    for each in json.loads(json.dumps(left.compilation)):
        assert each["backend"] == compilation.BACKEND
        for rank in each["ranks"]:
            assert rank["loss"] > 0 and rank["gradient_norm"] > 0 and rank["seconds"] > 0
            assert rank["compiled_loss"] == pytest.approx(
                rank["loss"], rel=each["tolerance"]["loss"]
            )
            assert rank["off"]["loss"] == abs(rank["compiled_loss"] - rank["loss"]) / rank["loss"]
            assert rank["off"]["gradient"] <= each["tolerance"]["gradient"]


def compiled_training_is_training(of: RunSpec, folder: Path, rtol: float) -> Trained:
    left, weights = trained(of, folder / "compiled")
    plain, expected = trained(
        dataclasses.replace(of, train=dataclasses.replace(of.train, compile=False)), folder / "p"
    )
    is_proven(left)
    assert not plain.compilation
    are_the_same_run(left, plain, rtol)
    for key, value in expected.items():
        assert (weights[key] - value).norm() <= 10 * rtol * value.norm(), key
    return left


@pytest.mark.parametrize(
    ("name", "method", "mode"),
    [
        (MINIATURES[0], METHODS[0], MODES[3]),
        *(
            pytest.param(MINIATURES[number % 2], METHODS[number // 2], mode, marks=pytest.mark.slow)
            for number, mode in zip((1, 2, 3, 0), MODES, strict=True)
            if number
        ),
    ],
)
def test_compiled_training_is_training(name: str, method: Any, mode: Any, tmp_path: Path) -> None:
    layout, again = mode
    of = spec(name, *method, layout=layout, activation_checkpointing=again)
    left = compiled_training_is_training(of, tmp_path, 0.0)
    broken(are_the_same_run, left, dataclasses.replace(left, losses=left.losses[::-1]), 1e-3)
    broken(is_proven, left, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adapter", "quantizer", "layout", "engine", "zero_stage", "dtype"),
    [
        (MINIATURES[0], "full", "none", "bins", "ddp", 0, "float32"),
        (MINIATURES[1], "lora_r8", "nf4", "padded", "deepspeed", 2, "float32"),
        (MINIATURES[1], "full", "none", "bins", "deepspeed", 1, "bfloat16"),
    ],
)
def test_torchs_compiler_is_proven_and_trains_alike(
    name: str,
    adapter: str,
    quantizer: str,
    layout: str,
    engine: Any,
    zero_stage: int,
    dtype: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    of = spec(name, adapter, quantizer, layout=layout, engine=engine, zero_stage=zero_stage)
    of = dataclasses.replace(of, model=dataclasses.replace(of.model, dtype=dtype))
    compiled_training_is_training(of, tmp_path, compilation.TOLERANCES[dtype][0])


@pytest.mark.parametrize(
    ("name", "adapter", "layout"),
    [
        (MINIATURES[0], "lora_r8", "bins"),
        (MINIATURES[1], "full", "padded"),
        pytest.param(MINIATURES[0], "full", "padded", marks=pytest.mark.slow),
        pytest.param(MINIATURES[1], "lora_r8", "bins", marks=pytest.mark.slow),
    ],
)
def test_batches_of_any_shape_are_few_codes(name: str, adapter: str, layout: str) -> None:
    """Twelve batches of other sizes and numbers of segments, over four layers: a code where a
    layer's input has a gradient, and one where it has none, and no more; a layer is never cut."""
    base = tiny(name)
    depth = "n_layer" if base.family == "gpt2" else "num_hidden_layers"
    deeper = dataclasses.replace(base, architecture={**base.architecture, depth: 4})
    model = stir(make(spec(deeper, adapter)).model)
    batches = [COLLATE[layout](random_examples(seed, count=2 + seed)) for seed in range(12)]
    assert len({batch.input_ids.shape for batch in batches}) > 6
    lm = SupervisedLM(model)
    ranks.start_process_group(CPU)
    counters.clear()
    with compilation.compiled(model, batches[0], "float32", lambda _: None):
        for batch in batches:
            lm(batch).backward()
        found = gradients(model)
        codes, cuts = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    assert 1 <= codes <= 2 and not cuts
    counters.clear()
    for batch in batches:
        lm(batch).backward()
    assert_same_gradients(found, gradients(model), 1e-6)
    assert not counters["stats"], "what is computed afterwards is as written"


# --- the proof


def something_else(factor: float) -> Any:
    """A backend that compiles to something slightly else: the result of every layer is `factor`
    of what it should be.
    """

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        return lambda *arguments: tuple(each * factor for each in graph(*arguments))

    return backend


@pytest.mark.parametrize("factor", [1 + 1e-3, 1 - 1e-3, float("nan")])
def test_a_code_that_computes_something_else_fails_the_cell(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", something_else(factor))
    with pytest.raises(
        CellFailed,
        match=r"^rank 0: compiled code computes something else: (loss|gradient)[^\n]* eager[^\n]*$",
    ):
        trained(spec(adapter="full"), tmp_path)


def test_another_code_that_computes_the_same_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", something_else(1.0))
    assert len(trained(spec(adapter="full"), tmp_path)[0].losses) == STEPS


def test_a_wrong_gradient_is_seen_where_the_loss_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        def half_a_gradient(*arguments: Any) -> Any:
            return tuple(each.lerp(each.detach(), 0.5) for each in graph(*arguments))

        return half_a_gradient

    monkeypatch.setattr(compilation, "BACKEND", backend)
    with pytest.raises(CellFailed, match="gradient"):
        trained(spec(adapter="full"), tmp_path)


def test_a_run_that_diverges_as_written_says_so(tmp_path: Path) -> None:
    of = spec(adapter="full")
    model = make(of).model
    next(iter(model.parameters())).data[:] = float("inf")
    with pytest.raises(Diverged, match="diverged at step 0"):
        train(model, random_examples(0, 30), of, CPU, control(tmp_path))


def test_what_does_not_compile_fails_the_cell_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(compilation, "BACKEND", backend)
    with pytest.raises(
        CellFailed,
        match=r"^rank 0: the model could not be compiled: [^\n]*no such instruction[^\n]*$",
    ):
        trained(spec(adapter="full"), tmp_path)


def leaves_nothing(model: torch.nn.Module, batch: Any) -> None:
    """Weights, buffers, gradients and generators after the proof are those before it, and no
    layer stays compiled.
    """
    kept: list[Any] = []
    tensors = [*model.named_parameters(), *model.named_buffers()]
    before, generator = images(tensors), torch.get_rng_state()
    with compilation.compiled(model, batch, "float32", kept.append):
        assert torch.equal(torch.get_rng_state(), generator)
        assert images(tensors) == before
        assert all(parameter.grad is None for parameter in model.parameters())
    assert len(kept) == 1 and all(each._compiled_call_impl is None for each in model.modules())


@pytest.mark.parametrize(
    ("adapter", "quantizer"), [METHODS[0], pytest.param(*METHODS[1], marks=pytest.mark.slow)]
)
def test_the_proof_leaves_nothing(
    adapter: str, quantizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.start_process_group(CPU)
    model, batch = (
        make(spec(MINIATURES[1], adapter, quantizer)).model,
        COLLATE["bins"](random_examples(0)),
    )
    leaves_nothing(model, batch)
    whole = compilation._pass

    def draws(*arguments: Any) -> Any:
        torch.rand(1)
        return whole(*arguments)

    monkeypatch.setattr(compilation, "_pass", draws)
    broken(leaves_nothing, model, batch)


def test_dropout_draws_the_same_numbers(tmp_path: Path) -> None:
    """As written and compiled the same units are dropped, so that the proof holds and so does
    the training after it.
    """
    of = spec(MINIATURES[0], "full")
    pdrop = {"resid_pdrop": 0.2, "embd_pdrop": 0.1}
    of = dataclasses.replace(
        of, model=dataclasses.replace(of.model, architecture={**of.model.architecture, **pdrop})
    )
    compiled_training_is_training(of, tmp_path, 0.0)


@pytest.mark.slow
def test_a_resumed_run_proves_again_and_ends_like_a_whole_one(tmp_path: Path) -> None:
    of, calls = spec(adapter="full", layout="bins"), []
    whole, weights = trained(of, tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(of, tmp_path / "cut", stop=lambda: calls.append(1) or len(calls) >= 2)
    resumed, again = trained(of, tmp_path / "cut")
    is_proven(resumed, 2)
    first, second = (each["ranks"][0]["loss"] for each in resumed.compilation)
    assert first != second, "of the weights as they are then"
    are_the_same_run(resumed, whole, 0.0)
    assert all(torch.equal(value, weights[key]) for key, value in again.items())


@pytest.mark.slow
def test_the_result_has_the_proof(place: Place) -> None:
    only = "gpt2*-none-full-tfns-*"
    cell = cells.expand(Selection("3", quick=True, only=only, weights="random"), "smoke")[0].spec
    few = dataclasses.replace(cell.train, compile=True, max_steps=2, warmup_steps=1)
    of = dataclasses.replace(cell, train=few)
    result = run.run_cell(of, place, lambda _: None, lambda: False)
    assert result_faults(result) == []
    assert result["status"] == "done", result["reason"]
    written = place.store.result(of.run_id)
    assert written is not None and written["spec"]["train"]["compile"] is True
    (proof,) = written["cell"]["compilation"]
    assert proof["ranks"][0]["off"]["loss"] <= proof["tolerance"]["loss"]
    assert written["costs"]["peak_compile_bytes"] > 0


# --- what cannot be compiled


def test_what_cannot_be_compiled_is_refused_by_name() -> None:
    assert compatibility.refusal(spec()) is None
    for changes, reason in (
        ({"engine": "deepspeed", "zero_stage": 3}, "ZeRO stage 3"),
        ({"quantizer": "int8"}, "int8"),
        ({"adapter": "dora_r8"}, "DoRA"),
    ):
        of = spec(**changes)
        assert reason in str(compatibility.refusal(of)) and "\n" not in str(
            compatibility.refusal(of)
        )
        as_written = dataclasses.replace(of, train=dataclasses.replace(of.train, compile=False))
        assert compatibility.refusal(as_written) is None
    assert compatibility.refusal(spec(quantizer="int8", max_steps=0, warmup_steps=0)) is None, (
        "nothing is trained"
    )


def test_a_machine_without_a_compiler_is_a_fault_before_anything_is_loaded(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilation.expect_compiler(spec(), CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("finrepro.running.inputs.load_data", lambda *_: pytest.fail("loaded"))
    with pytest.raises(EnvironmentFault, match=r"^'compile: true' needs a C\+\+ compiler[^\n]*$"):
        walk(spec(), place, lambda _: None, lambda: False, lambda _: False, 0.0)
    compilation.expect_compiler(spec(compile=False), CPU)


def test_the_setting_is_part_of_a_runs_identity_only_where_it_is_on() -> None:
    off, on = spec(compile=False), spec()
    assert off.run_id != on.run_id
    assert "compile" not in off.canonical()["train"] and on.canonical()["train"]["compile"] is True


# --- attention over segments as one operator


def the_operator_is_attention(
    of: Any, heads: tuple[int, int], lengths: tuple[int, ...], scaling: float | None
) -> None:
    """Result and gradients, to the last bit."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(lengths), 16) for count in (heads[0], heads[1], heads[1])]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    found = []
    for compute, segments in ((of, torch.tensor(lengths)), (attention._over_segments, lengths)):
        leaves = [value.clone().requires_grad_() for value in values]
        out = compute(*leaves, segments, scaling)
        slopes = torch.autograd.grad((out * torch.arange(16.0)).sum(), leaves)
        found.append([out, *slopes])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs) and mine.is_contiguous()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("lengths", [(5,), (1, 1), (7, 1, 20, 3)])
def test_the_operator_is_attention(heads: tuple[int, int], lengths: tuple[int, ...]) -> None:
    for scaling in (None, 0.3):
        the_operator_is_attention(attention._operator, heads, lengths, scaling)
        broken(
            the_operator_is_attention,
            lambda *a: attention._operator(*a[:4], 0.2),
            heads,
            (3, 4),
            scaling,
        )


def test_the_operator_keeps_torchs_rules() -> None:
    """Shapes without values, and gradients, as `torch.library` wants them of every operator."""
    query = torch.randn(1, 4, 9, 8, requires_grad=True)
    key, value = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(2))
    torch.library.opcheck(attention._operator, (query, key, value, torch.tensor([4, 5]), None))


# --- ranks

PROGRAM = """
import sys
from pathlib import Path
from test_compilation import CellFailed, compilation, json, runtime, something_else, spec, trained
from finrepro.runtime import ranks
runtime.quiet_environment()
runtime.setup(0, 1)
compilation.BACKEND = "aot_eager"
if sys.argv[1] == "mutant" and ranks.current().rank == 1:
    compilation.BACKEND = something_else(1.001)
try:
    found = trained(spec(adapter="full", max_tokens=32), Path(sys.argv[2]))[0].compilation
except CellFailed as error:
    found = str(error)
Path(sys.argv[2], f"{ranks.current().rank}.json").write_text(json.dumps(found))
ranks.leave_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["right", "mutant"])
def test_every_rank_proves_its_own_batch_and_one_ends_all(which: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    on_ranks(tmp_path / "program.py", which, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    if which == "mutant":
        assert first.startswith("rank 1: compiled code computes something else")
    else:
        losses = [each["loss"] for each in first[0]["ranks"]]
        assert len(set(losses)) == 2, "each its own"
