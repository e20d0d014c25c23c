"""Cells whose layers are two factors, or dense, under the optimizers of pretraining, and what
the ranks of tests/methods/optimizers/test_optimizers.py run: `python optimizers_program.py
folder`. Each rank leaves `<ranks>-<rank>.pt` in the folder."""

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model import CPU, MINIATURES, make, random_examples, spec_of, tiny
from fixtures.planted import plant
from fixtures.process import on_ranks
from safetensors.torch import load_file
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.spec import RunSpec
from finrepro.data.batches import COLLATE
from finrepro.kinds import choose
from finrepro.methods.adapters import full
from finrepro.methods.adapters import relora as method
from finrepro.methods.layers.linear import features, linear_layers
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.runtime import process, ranks
from finrepro.settings import Choice
from finrepro.training.checkpoint import Control
from finrepro.training.engine_view import EngineView
from finrepro.training.engines.deepspeed import collect_trained
from finrepro.training.loop import train
from finrepro.training.schedule import learning_rate
from finrepro.training.steps import steps_from

GPT2, LLAMA = MINIATURES
STEPS, RANK = 6, 8
FEW = {
    "max_steps": STEPS,
    "warmup_steps": 2,
    "global_batch_size": 6,
    "sort_window": 1,
    "max_tokens": 64,
    "lr": 1e-2,
}
ENGINES = (("ddp", 0), *(("deepspeed", stage) for stage in range(4)))
ADAMW = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
PLAIN = {"kind": "adamw", **ADAMW}
FROBENIUS = {"kind": "adamw_frobenius", **ADAMW, "frobenius_decay": 0.5}
EIGHT_BITS = {"kind": "adamw_8bit", **ADAMW, "embeddings_32bit": True}
GALORE = {"kind": "galore_adamw", **ADAMW, "rank": RANK, "update_proj_gap": 2, "step_scale": 0.25}
# Steps that are all but zero: what is left is decay, to the last digit.
STILL = {"eps": 1e12}
RANKED = (
    *(
        (FROBENIUS["kind"], *key)
        for key in (("ddp", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3))
    ),
    *(
        (kind, *key)
        for kind in (EIGHT_BITS["kind"], GALORE["kind"])
        for key in (("ddp", 0), ("deepspeed", 0))
    ),
)
RELORA_RANKED = (("ddp", 0), ("deepspeed", 2), ("deepspeed", 3))
SETTINGS = {str(each["kind"]): each for each in (FROBENIUS, EIGHT_BITS, GALORE)}


class TwoFactors(nn.Module):
    """y = B A x + c, as low-rank pretraining names its parameters."""

    def __init__(self, layer: Any, r: int, seed: int) -> None:
        super().__init__()
        d_in, d_out = features(layer)
        self.a, self.b = (
            nn.Linear(d_in, r, bias=False),
            nn.Linear(r, d_out, bias=layer.bias is not None),
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each in self.parameters():
                each.copy_(0.2 * torch.randn(each.shape, generator=generator))
        self.to(layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def factorized(model: nn.Module, config: Any, seed: int) -> nn.Module:
    """Every linear layer of the blocks in two factors; everything is trained."""
    for place, (name, layer) in enumerate(linear_layers(model).items()):
        model.set_submodule(name, TwoFactors(layer, RANK, seed + place))
    return model.requires_grad_(True)


@contextmanager
def in_factors(wanted: bool = True) -> Iterator[None]:
    """Inside, the adapter `full` trains low-rank layers."""
    kept = full.apply
    full.apply = factorized if wanted else kept
    try:
        yield
    finally:
        full.apply = kept


def chosen(settings: dict[str, Any], **changes: Any) -> Choice:
    """An optimizer's settings, changed."""
    return choose("optimizers", "tried", {**settings, **changes}, "test")


def cell(
    optimizer: Choice,
    engine: Any = "ddp",
    stage: int = 0,
    name: str = LLAMA,
    dtype: str = "float32",
    **changes: Any,
) -> RunSpec:
    """A cell that trains every weight."""
    model = dataclasses.replace(tiny(name), dtype=dtype)
    spec = spec_of(model, "full", "none", engine=engine, zero_stage=stage, **{**FEW, **changes})
    return dataclasses.replace(spec, train=dataclasses.replace(spec.train, optimizer=optimizer))


def control(
    folder: Path, stop: Callable[[], bool] = lambda: False, seen: list[Any] | None = None
) -> Control:
    """No clock: checkpoints are written on request only."""
    return Control((seen if seen is not None else []).append, stop, folder, checkpoint_seconds=1e9)


def run(spec: RunSpec, folder: Path, **options: Any) -> dict[str, Any]:
    """Losses, and the weights at the end; the layers are in factors where the optimizer is for
    those.
    """
    with in_factors(spec.train.optimizer.kind == FROBENIUS["kind"]):
        model = make(spec).model
    rows = train(model, random_examples(0, 30), spec, CPU, control(folder, **options)).losses
    collect_trained(model)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"losses": [row["loss"] for row in rows], "weights": weights}


def states_of(spec: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> what the optimizer keeps of a parameter, after a run."""
    found: dict[str, Any] = {}

    def after(view: EngineView, step: int, max_steps: int) -> None:
        state = view._base.state
        found.update(
            (name, dict(state[view._share(each).owner])) for name, each in view.trained.items()
        )

    with pytest.MonkeyPatch.context() as patch:
        plant(patch, full, after_step=after)
        run(spec, folder)
    return found


def kept_bytes(states: dict[str, dict[str, Any]]) -> int:
    """Of moments, scales and projections; not of maps that all share, nor of counts."""
    return sum(
        value.numel() * value.element_size()
        for state in states.values()
        for key, value in state.items()
        if key != "step" and not key.startswith("qmap")
    )


def relora(
    engine: Any = "ddp", stage: int = 0, name: str = LLAMA, dtype: str = "float32", **changes: Any
) -> RunSpec:
    """Three periods of ReLoRA, with a rate that rises over two steps of each but the first."""
    entry = reader.adapter("relora").config
    config = dataclasses.replace(
        entry, **{"r": 4, "reset_every": 3, "restart_warmup": 2, "keep_moments": 0.25, **changes}
    )
    adapter = Choice(name="relora", kind="relora", config=config)
    spec = cell(chosen({**PLAIN, "weight_decay": 0.01}), engine, stage, name, dtype, max_steps=8)
    return dataclasses.replace(spec, adapter=adapter)


def run_relora(spec: RunSpec, folder: Path, **options: Any) -> dict[str, Any]:
    """Losses and rates, and what the first rank exports."""
    model = make(spec).model
    rows = train(
        model, random_examples(0, 30), spec, CPU, control(folder / "checkpoints", **options)
    ).losses
    collect_trained(model)
    tensors: dict[str, Any] = {}
    if ranks.current().is_main:
        (folder / "weights").mkdir(parents=True)
        method.export(model, folder / "weights")
        tensors = load_file(folder / "weights" / "model.safetensors")
    return {
        "losses": [row["loss"] for row in rows],
        "rates": [row["lr"] for row in rows],
        "weights": tensors,
    }


def by_hand(
    spec: RunSpec, step: Callable[[dict[str, nn.Parameter], float, int], None]
) -> dict[str, Any]:
    """The same by torch alone: one example a forward pass, no engine; `step` is given the
    parameters by name, the rate and the step.
    """
    with in_factors(spec.train.optimizer.kind == FROBENIUS["kind"]):
        model, settings, examples = make(spec).model, spec.train, random_examples(0, 30)
    named, losses = dict(model.named_parameters()), []
    for index, rows in steps_from(0, [len(each.ids) for each in examples], settings, spec.seed):
        lm, supervised = SupervisedLM(model), sum(examples[row].num_supervised for row in rows)
        loss = sum(lm(COLLATE["padded"]([examples[row]])) for row in rows) / supervised
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), settings.max_grad_norm)
        with torch.no_grad():
            step(named, learning_rate(index, settings), index)
        model.zero_grad()
        losses.append(float(loss.detach()))
    return {
        "losses": losses,
        "weights": {name: parameter.detach().clone() for name, parameter in named.items()},
    }


@cache
def two_ranks() -> dict[str, Any]:
    """What two ranks have computed, once a process; `2-0` and `2-1`."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(Path(__file__), folder)
        return {
            path.stem: torch.load(path, weights_only=False) for path in Path(folder).glob("*.pt")
        }


def main(folder: Path) -> None:
    """Every engine on several ranks."""
    process.quiet_environment()
    process.setup(0, 1)
    here, found = ranks.current(), {}
    for kind, *engine in RANKED:
        found[kind, *engine] = run(
            cell(chosen(SETTINGS[kind]), *engine), folder / f"{here.world_size}-{kind}-{engine}"
        )
    for engine in RELORA_RANKED:
        found["relora", *engine] = run_relora(
            relora(*engine), folder / f"{here.world_size}-relora-{engine}"
        )
    torch.save(found, folder / f"{here.world_size}-{here.rank}.pt")
    ranks.leave_process_group()
    process.end(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
