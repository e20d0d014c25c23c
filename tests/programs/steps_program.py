"""A method that uses every hook of the training loop, the plain torch loop that does the same by
hand, and what the ranks of tests/training/test_steps.py run: `python steps_program.py folder`.
Each rank leaves `<ranks>-<rank>.pt` in the folder."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model import CPU, make, random_examples, spec_of
from fixtures.planted import plant
from torch import Tensor, nn

from finrepro.catalogue.spec import RunSpec
from finrepro.data.batches import COLLATE
from finrepro.kinds import kind_module
from finrepro.methods.adapters import iec
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.runtime import process, ranks, zero3
from finrepro.training.checkpoint import Control
from finrepro.training.engine_view import EngineView
from finrepro.training.engines.deepspeed import collect_trained
from finrepro.training.loop import train
from finrepro.training.schedule import learning_rate
from finrepro.training.steps import steps_from

NAME = "llama3_1_8b_mini"
STEPS, SET, RESET = (
    8,
    1,
    4,
    # two weights are set after step SET and their moments zeroed, every moment and step count after
    # step RESET
)
FEW = {
    "max_steps": STEPS,
    "warmup_steps": 1,
    "global_batch_size": 6,
    "sort_window": 1,
    "max_tokens": 64,
    "lr": 1e-2,
}
ENGINES = (("ddp", 0), *(("deepspeed", stage) for stage in range(4)))
WEIGHT, KEPT = 0.02, 0.9  # of the extra loss, a quadratic, and of the moving average of a gradient
# A matrix, and a scalar, whose size two ranks cannot share evenly; a base weight.
MATRIX, SCALAR = "model.layers.1.self_attn.k_proj.lora_B", "model.layers.1.self_attn.k_proj.beta_B"
FROZEN = "model.layers.0.mlp.up_proj.base_layer.weight"
Named = dict[str, nn.Parameter]


def spec(engine: Any = "ddp", stage: int = 0, **changes: Any) -> RunSpec:
    """A cell with an adapter of our own layers."""
    return spec_of(NAME, "iec_r8", "none", engine=engine, zero_stage=stage, **{**FEW, **changes})


def trained_of(model: nn.Module) -> Named:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def new_value(shape: Any) -> Tensor:
    return torch.linspace(-0.3, 0.4, torch.Size(shape).numel()).reshape(shape)


def quadratic(model: nn.Module) -> Tensor:
    """Half the squared length of everything trained, a little."""
    return WEIGHT / 2 * sum(p.float().pow(2).sum() for p in trained_of(model).values())


class Method:
    """Hooks to be put on an adapter's module; `seen` keeps what they read."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def extra_loss(self, model: nn.Module, config: Any) -> Tensor:  # noqa: ARG002
        return quadratic(model)

    def before_step(self, view: EngineView, config: Any, step: int, max_steps: int) -> None:  # noqa: ARG002
        """Keep the moving average of a gradient in the model."""
        assert max_steps == STEPS
        gradient = view.gradient(view.trained[MATRIX])
        model: Any = view.model
        model.average = (
            KEPT * getattr(model, "average", torch.zeros_like(gradient)) + (1 - KEPT) * gradient
        )
        self.seen.append([step, gradient, view.gradient(view.trained[SCALAR])])

    def after_step(self, view: EngineView, config: Any, step: int, max_steps: int) -> None:  # noqa: ARG002
        matrix, scalar = view.trained[MATRIX], view.trained[SCALAR]
        view.set(matrix, view.value(matrix) - view.model.average)
        base = view.model.get_parameter(FROZEN)
        if step == SET:
            for parameter in (matrix, scalar):
                view.set(parameter, new_value(view.value(parameter).shape))
            view.reset_state((matrix, scalar), steps=False)
            view.set_frozen(base, 0.9 * view.whole(base))
        if step == RESET:
            view.reset_state(view.trained.values())
        self.seen[-1] += [view.value(matrix), view.value(scalar), view.whole(base)]

    def state(self, model: Any) -> dict[str, Any]:
        return {"average": model.average, "frozen": zero3.whole(model.get_parameter(FROZEN))}

    def load_state(self, model: Any, state: dict[str, Any]) -> None:
        model.average = state["average"]
        zero3.fill(model.get_parameter(FROZEN), state["frozen"])


HOOKS = ("extra_loss", "before_step", "after_step", "state", "load_state")


@contextmanager
def hooked(method: Any) -> Iterator[None]:
    """Inside, the adapter has these hooks."""
    with pytest.MonkeyPatch.context() as patch:
        hooks = {name: getattr(method, name) for name in HOOKS if hasattr(method, name)}
        plant(patch, iec, **hooks)
        yield


def control(
    folder: Path, stop: Callable[[], bool] = lambda: False, seen: list[Any] | None = None
) -> Control:
    """No clock: checkpoints are written on request only."""
    return Control((seen if seen is not None else []).append, stop, folder, checkpoint_seconds=1e9)


def run(cell: RunSpec, folder: Path, method: Any = None, **options: Any) -> dict[str, Any]:
    """The losses, what the hooks have read, and at the end what was trained, of a cell under the
    hooks.
    """
    method = method or Method()
    with hooked(method):
        model = make(cell).model
        losses = [
            row["loss"]
            for row in train(
                model, random_examples(0, 30), cell, CPU, control(folder, **options)
            ).losses
        ]
    collect_trained(model)
    weights = {name: parameter.detach().clone() for name, parameter in trained_of(model).items()}
    return {"losses": losses, "seen": method.seen, "weights": weights}


def reference() -> dict[str, Any]:
    """The same by hand: torch alone, one example a forward pass, no hooks, no view."""
    cell = spec()
    settings, model, examples = cell.train, make(cell).model, random_examples(0, 30)
    named = trained_of(model)
    optimizer = kind_module("optimizers", settings.optimizer.kind).build(
        list(named.items()), settings.lr, settings.optimizer.config
    )
    losses, seen, average = [], [], torch.zeros(named[MATRIX].shape)
    base, matrix, scalar = model.get_parameter(FROZEN), named[MATRIX], named[SCALAR]
    for step, rows in steps_from(0, [len(each.ids) for each in examples], settings, cell.seed):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        lm = SupervisedLM(model)
        supervised = sum(examples[row].num_supervised for row in rows)
        loss = sum(lm(COLLATE["padded"]([examples[row]])) for row in rows) / supervised
        optimizer.zero_grad()
        (loss + quadratic(model)).backward()
        average = KEPT * average + (1 - KEPT) * matrix.grad
        seen.append([step, matrix.grad.clone(), scalar.grad.clone()])
        torch.nn.utils.clip_grad_norm_(list(named.values()), settings.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            matrix -= average
            if step == SET:
                for parameter in (matrix, scalar):
                    parameter.copy_(new_value(parameter.shape))
                    optimizer.state[parameter]["exp_avg"].zero_()
                    optimizer.state[parameter]["exp_avg_sq"].zero_()
                base *= 0.9
        if step == RESET:
            optimizer.state.clear()
        losses.append(float(loss.detach()))
        seen[-1] += [matrix.detach().clone(), scalar.detach().clone(), base.clone()]
    weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    return {"losses": losses, "seen": seen, "weights": weights}


def main(folder: Path) -> None:
    """Every engine, whole."""
    process.quiet_environment()
    process.setup(0, 1)
    here = ranks.current()
    found = {key: run(spec(*key), folder / str(here.world_size) / f"{key}") for key in ENGINES}
    torch.save(found, folder / f"{here.world_size}-{here.rank}.pt")
    ranks.leave_process_group()
    process.end(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
