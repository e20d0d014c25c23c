"""A step does not depend on the micro-batches that it is cut into: loss, gradients, their norm and
the updated weights are those of the global batch, one example at a time, in both layouts, on every
engine, on one rank and on two.

The law is what the sum over supervised tokens, divided once by their number in the global batch, is
for: a mean of the micro-batches' own means weighs a token by how many others happen to lie beside
it, and is the planted mutant.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fixtures.model import (
    CPU,
    MINIATURES,
    assert_same_gradients,
    broken,
    make,
    process,
    random_examples,
    spec_of,
    stir,
)
from fixtures.process import on_ranks
from torch import Tensor

from finrepro.catalogue.spec import RunSpec
from finrepro.data.batches import side_by_side
from finrepro.data.tokens import Encoded
from finrepro.kinds import optimizer_of
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.runtime import process as runtime
from finrepro.runtime import ranks
from finrepro.training.engines.start import start_engine
from finrepro.training.loop import optimizer_step
from finrepro.training.steps import micro_batches

assert process  # every test here computes
ENGINES = (("ddp", 0), ("deepspeed", 0), ("deepspeed", 2))
CELLS = ((MINIATURES[0], "full"), (MINIATURES[1], "lora_r8"))
CUTS = (
    ("padded", 1),
    ("padded", 50),
    ("padded", 10_000),
    ("bins", 1),
    ("bins", 50),
    ("bins", 10_000),
)
CLIPPED = 0.5
ON_RANKS = (("padded", 50), ("bins", 1), ("bins", 50))
# With so large an epsilon AdamW's step is in proportion to the gradient: its usual one moves by the
# sign, even where that is rounding.
SMOOTH = {"kind": "adamw", "betas": [0.9, 0.999], "eps": 1.0, "weight_decay": 0.0}
Step = Callable[..., tuple[float, float]]
Found = dict[str, Any]  # loss, norm, gradients and moves of the weights in one step


def examples() -> list[Encoded]:
    """Ten of unequal lengths with answers of unequal lengths, so that no two micro-batches weigh
    the same.
    """
    return random_examples(5, count=10, longest=30, answers=(1, 9))


def cell(
    name: str, adapter: str, engine: str, zero_stage: int, layout: str, max_tokens: int
) -> RunSpec:
    return spec_of(
        name,
        adapter,
        engine=engine,
        zero_stage=zero_stage,
        layout=layout,
        max_tokens=max_tokens,
        max_grad_norm=CLIPPED,
        lr=1.0,
        warmup_steps=0,
        optimizer=SMOOTH,
    )


def engine_step(of: RunSpec, step: Step = optimizer_step) -> Found:
    """One step of the engine from stirred weights over this rank's micro-batches, with its
    optimizer.
    """
    model, data = stir(make(of).model), examples()
    rows, lengths = list(range(len(data))), [len(each.ids) for each in data]
    engine = start_engine(model, of.train, CPU)
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    before = {name: each.detach().clone() for name, each in named.items()}
    gradients: dict[str, Tensor] = {}

    def before_update() -> None:
        for name, each in named.items():
            found = engine.gradient(each)
            gradients[name] = torch.zeros(each.shape) if found is None else found.detach().clone()

    batches = micro_batches(rows, data, lengths, of.train, ranks.current())
    supervised = sum(each.num_supervised for each in data)
    loss, norm = step(engine, batches, supervised, CPU, before_update)
    engine.close()
    moves = {name: each.detach() - before[name] for name, each in named.items()}
    return {
        "loss": loss,
        "norm": norm,
        "gradients": gradients,
        "moves": moves,
        "batches": len(batches),
    }


def plain_step(of: RunSpec) -> Found:
    """The same step from its definition: a forward pass an example, one sum, one division,
    torch's clipping and optimizer.
    """
    model, data = stir(make(of).model), examples()
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    before = {name: each.detach().clone() for name, each in named}
    optimizer = optimizer_of(of.train.optimizer).build(named, of.train.lr)
    loss = sum(SupervisedLM(model)(side_by_side([each])) for each in data) / sum(
        each.num_supervised for each in data
    )
    loss.backward()
    gradients = {name: each.grad.clone() for name, each in named}
    norm = torch.nn.utils.clip_grad_norm_([each for _, each in named], of.train.max_grad_norm)
    optimizer.step()
    moves = {name: each.detach() - before[name] for name, each in named}
    return {
        "loss": float(loss.detach()),
        "norm": float(norm),
        "gradients": gradients,
        "moves": moves,
    }


def is_the_global_batchs_step(found: Found, expected: Found) -> None:
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["norm"], expected["norm"], rtol=1e-4)
    assert_same_gradients(found["gradients"], expected["gradients"], 1e-4)
    assert_same_gradients(found["moves"], expected["moves"], 1e-3)


def mean_of_means(
    engine: Any,
    batches: Sequence[Any],
    _: int,
    device: torch.device,
    before_update: Callable[[], None],
) -> tuple[float, float]:
    """The mutant: every micro-batch is divided by its own supervised tokens, and by how many
    micro-batches there are.
    """
    total = torch.zeros(())
    for index, batch in enumerate(batches):
        share = 1 / (len(batches) * max(1, len(batch.positions)))
        total += (
            engine.backward(batch.to(device), share, index == len(batches) - 1)
            / dist.get_world_size()
        )
    before_update()
    norm = engine.update()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return float(total), float(norm)


@pytest.mark.parametrize(
    ("engine", "zero_stage"),
    [ENGINES[0], pytest.param(*ENGINES[1], marks=pytest.mark.slow), ENGINES[2]],
)
@pytest.mark.parametrize(("name", "adapter"), CELLS)
def test_a_step_does_not_depend_on_its_micro_batches(
    name: str, adapter: str, engine: str, zero_stage: int
) -> None:
    expected = plain_step(cell(name, adapter, engine, zero_stage, "padded", 1))
    assert expected["norm"] > CLIPPED, "the norm decides the step"
    counts = set()
    for layout, max_tokens in CUTS:
        of = cell(name, adapter, engine, zero_stage, layout, max_tokens)
        found = engine_step(of)
        is_the_global_batchs_step(found, expected)
        counts.add(found["batches"])
        if 1 < found["batches"] < len(examples()):
            broken(is_the_global_batchs_step, engine_step(of, mean_of_means), expected)
    assert {1, len(examples())} < counts, "whole, and an example each, and between"


def _as_rank(folder: Path, which: str) -> None:
    """What a rank of the test below runs."""
    runtime.quiet_environment()
    runtime.setup(0, 1)
    step = {"right": optimizer_step, "mutant": mean_of_means}[which]
    found = {}
    for name, adapter in CELLS:
        for engine, zero_stage in ENGINES:
            for layout, max_tokens in ON_RANKS:
                of = cell(name, adapter, engine, zero_stage, layout, max_tokens)
                found[name, adapter, engine, zero_stage, layout, max_tokens] = engine_step(of, step)
    torch.save(found, folder / f"{which}-{ranks.current().rank}.pt")
    ranks.leave_process_group()


@pytest.mark.slow
def test_nor_on_two_ranks(tmp_path: Path) -> None:
    """Ranks share the examples out, unevenly in tokens; one may have fewer micro-batches than
    the other.
    """
    for which in ("right", "mutant"):
        on_ranks(Path(__file__), tmp_path, which)
    both = [torch.load(tmp_path / f"right-{rank}.pt", weights_only=False) for rank in range(2)]
    mutant = torch.load(tmp_path / "mutant-0.pt", weights_only=False)
    assert len(both[0]) == len(CELLS) * len(ENGINES) * len(ON_RANKS)
    for of in both[0]:
        expected = plain_step(cell(*of))
        for found in both:
            is_the_global_batchs_step(found[of], expected)
        if of[-1] == 50:
            broken(is_the_global_batchs_step, mutant[of], expected)


if __name__ == "__main__":
    _as_rank(Path(sys.argv[1]), sys.argv[2])
