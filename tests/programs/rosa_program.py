"""ROSA in the training loop, the plain torch loop that does the same by hand, and what the ranks
of tests/methods/adapters/test_rosa_training.py run: `python rosa_program.py folder`. Each rank
leaves `<ranks>-<rank>.pt` in the folder."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fixtures.model import CPU, MINIATURES, images, make, random_examples, spec_of, tiny
from safetensors.torch import load_file
from torch import nn

from finrepro.catalogue import reader
from finrepro.catalogue.spec import RunSpec
from finrepro.data.batches import COLLATE
from finrepro.kinds import optimizer_of
from finrepro.methods.adapters import rosa as method
from finrepro.methods.layers import rosa
from finrepro.methods.layers.rosa import RosaLinear, directions, factors
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.models.build import load
from finrepro.runtime import process, ranks, zero3
from finrepro.settings import Choice
from finrepro.training.checkpoint import Control
from finrepro.training.engines.deepspeed import collect_trained, inference
from finrepro.training.loop import train
from finrepro.training.schedule import learning_rate
from finrepro.training.steps import steps_from

GPT2, LLAMA = MINIATURES
STEPS, EVERY = 8, 3  # periods of 3, 3 and 2 steps
FEW = {
    "max_steps": STEPS,
    "warmup_steps": 1,
    "global_batch_size": 6,
    "sort_window": 1,
    "max_tokens": 64,
    "lr": 1e-2,
}
ENGINES = (("ddp", 0), *(("deepspeed", stage) for stage in range(4)))
RANKED = (
    *((LLAMA, *engine, "float32") for engine in (("ddp", 0), ("deepspeed", 2), ("deepspeed", 3))),
    *((GPT2, "deepspeed", stage, "float32") for stage in (0, 3)),
    (LLAMA, "deepspeed", 2, "bfloat16"),
    (GPT2, "deepspeed", 3, "bfloat16"),
)


def cell(
    name: str = LLAMA, engine: Any = "ddp", stage: int = 0, dtype: str = "float32", **changes: Any
) -> RunSpec:
    """Three periods."""
    config = dataclasses.replace(reader.adapter("rosa_r8").config, resample_every=EVERY, r=4)
    model = dataclasses.replace(tiny(name), dtype=dtype)
    choice = Choice(name="rosa", kind="rosa", config=config)
    return spec_of(model, choice, "none", engine=engine, zero_stage=stage, **{**FEW, **changes})


def control(
    folder: Path, stop: Callable[[], bool] = lambda: False, seen: list[Any] | None = None
) -> Control:
    """No clock: checkpoints are written on request only."""
    return Control((seen if seen is not None else []).append, stop, folder, checkpoint_seconds=1e9)


def parts(model: nn.Module, trained: Callable[[nn.Parameter], Any]) -> dict[str, str]:
    """The images of each layer's A, B and W_f; every rank calls it."""
    found: list[Any] = []
    for layer in method.layers_of(model):
        found += [
            (f"{layer.name} {each}", trained(getattr(layer, each))) for each in ("lora_A", "lora_B")
        ]
        found.append((f"{layer.name} W_f", zero3.whole(layer.base_layer.weight).float()))
    return images(found)


@contextmanager
def watched(seen: list[Any], around: Callable[..., None] | None = None) -> Iterator[None]:
    """Inside, `seen` gets the parts after every step, and what the optimizer remembers of A and
    B.
    """
    kept = method.after_step

    def after_step(handle: Any, config: Any, step: int, max_steps: int) -> None:
        (around or kept)(handle, config, step, max_steps)
        moments = [value for state in handle._base.state.values() for value in state.values()]
        seen.append(
            [
                parts(handle.model, handle.value),
                sum(float(abs(torch.as_tensor(m)).sum()) for m in moments),
            ]
        )

    method.after_step = after_step
    try:
        yield
    finally:
        method.after_step = kept


def run(
    spec: RunSpec, folder: Path, around: Callable[..., None] | None = None, **options: Any
) -> dict[str, Any]:
    """The losses and rates, the parts after every step, and what the first rank exports."""
    seen: list[Any] = []
    with watched(seen, around):
        model = make(spec).model
        begun = parts(model, lambda parameter: parameter)
        rows = train(
            model, random_examples(0, 30), spec, CPU, control(folder / "checkpoints", **options)
        ).losses
    with inference(model, spec.train, CPU):
        batch = COLLATE["padded"]([random_examples(5, count=1)[0]])
        with torch.no_grad():
            scored = float(SupervisedLM(model)(batch))
    frozen = parts(model, lambda _: torch.zeros(1))
    collect_trained(model)
    tensors: dict[str, Any] = {}
    if ranks.current().is_main:
        (folder / "weights").mkdir(parents=True)
        method.export(model, folder / "weights")
        tensors = load_file(folder / "weights" / "adapter_model.safetensors")
    losses, rates = ([row[each] for row in rows] for each in ("loss", "lr"))
    return {
        "losses": losses,
        "rates": rates,
        "seen": seen,
        "begun": begun,
        "frozen": frozen,
        "scored": scored,
        "tensors": tensors,
    }


def reference(spec: RunSpec) -> dict[str, Any]:
    """The same by hand: torch alone, dense weights, one example a forward pass, no hooks.
    Losses, and what each W has learned.
    """
    settings, config = spec.train, spec.adapter.config
    model: Any = load(spec, None)
    layers = {layer.name: layer for layer in method.layers_of(make(spec).model)}
    weights = {name: model.get_submodule(name).weight for name in layers}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    model.requires_grad_(False)
    pairs: dict[str, Any] = {}
    examples, losses, period = random_examples(0, 30), [], 0

    def flipped(name: str, matrix: Any) -> Any:
        return matrix.T if spec.model.family == "gpt2" else matrix

    def begin(period: int) -> None:
        for name, weight in weights.items():
            chosen = directions("random", min(weight.shape), config.r, spec.seed, period, name)
            a, b = factors(flipped(name, weight).contiguous(), chosen, config.gauge)
            frozen = flipped(name, weight) - b @ a
            pairs[name] = frozen, nn.Parameter(a), nn.Parameter(b)

    begin(0)
    optimizer = fresh(settings, pairs)
    for step, rows in steps_from(0, [len(each.ids) for each in examples], settings, spec.seed):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        merged = {
            f"{name}.weight": flipped(name, frozen + b @ a)
            for name, (frozen, a, b) in pairs.items()
        }
        supervised = sum(examples[row].num_supervised for row in rows)
        lm, dense = SupervisedLM(model), {f"model.{each}": value for each, value in merged.items()}
        batches = [COLLATE["padded"]([examples[row]]) for row in rows]
        loss = (
            sum(torch.func.functional_call(lm, dense, (batch,)) for batch in batches) / supervised
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for _, a, b in pairs.values() for p in (a, b)], settings.max_grad_norm
        )
        optimizer.step()
        losses.append(float(loss.detach()))
        last = step + 1 == settings.max_steps
        if last or (step + 1) % config.resample_every == 0:
            with torch.no_grad():
                for name, (frozen, a, b) in pairs.items():
                    weights[name].copy_(flipped(name, frozen + b @ a))
            if not last:
                period += 1
                begin(period)
                optimizer = fresh(settings, pairs)
    return {
        "losses": losses,
        "learned": {name: flipped(name, weights[name] - before[name]) for name in weights},
    }


def fresh(settings: Any, pairs: dict[str, Any]) -> Any:
    """An optimizer that remembers nothing."""
    named = [
        (f"{name}.{each}", p)
        for name, (_, *both) in pairs.items()
        for each, p in zip("ab", both, strict=True)
    ]
    return optimizer_of(settings.optimizer).build(named, settings.lr)


def learned(tensors: dict[str, Any]) -> dict[str, Any]:
    """Name -> B A of an exported file."""
    names = [
        name.removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")
    ]
    return {
        each.removeprefix("base_model.model."): tensors[f"{each}.lora_B.weight"]
        @ tensors[f"{each}.lora_A.weight"]
        for each in names
    }


@contextmanager
def noisy(together: bool) -> Iterator[None]:
    """Inside, an SVD comes out another way on every rank. Without `together` they do not share
    the work: a mutant.
    """
    rank, kept, shared = ranks.current().rank, rosa.factors, method._begin_period
    rosa.factors = lambda weight, *more: kept(weight * (1 + 1e-4 * rank), *more)
    method._begin_period = shared if together else alone
    try:
        yield
    finally:
        rosa.factors, method._begin_period = kept, shared


def alone(layers: list[RosaLinear], compute: Callable[..., Any]) -> list[Any]:
    """Every rank for itself."""
    starts = []
    for layer in layers:
        weight = layer.base_layer.weight
        frozen, start = layer.as_stored(
            compute(layer, layer.frozen(weight.detach().clone())), weight.dtype
        )
        zero3.fill(weight, frozen)
        starts.append(start)
    return starts


def main(folder: Path) -> None:
    """Every engine on several ranks."""
    process.quiet_environment()
    process.setup(0, 1)
    here, found = ranks.current(), {}
    for key in RANKED:
        found[key] = run(cell(*key), folder / str(here.world_size) / "-".join(map(str, key)))
    for together in (True, False):
        with noisy(together):
            found["noisy", together] = run(
                cell(), folder / str(here.world_size) / f"noisy-{together}"
            )
    torch.save(found, folder / f"{here.world_size}-{here.rank}.pt")
    ranks.leave_process_group()
    process.end(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
