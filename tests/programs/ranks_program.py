"""What the ranks of tests/running/test_ranks.py run: `python ranks_program.py part folder`. Each
rank leaves `<ranks>-<rank>.pt` in the folder.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fixtures.model import (
    CPU,
    EVALUATION,
    MINIATURES,
    make,
    random_examples,
    real_examples,
    spec_of,
    stir,
    tokenizer,
)
from safetensors.torch import load_file
from torch import nn

from finrepro.catalogue import reader
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import Interrupted
from finrepro.evaluation import log_likelihood
from finrepro.evaluation.evaluate import evaluate
from finrepro.evaluation.generation import generate
from finrepro.evaluation.share_out import share_out
from finrepro.kinds import adapter_of
from finrepro.runtime import process, ranks
from finrepro.training.checkpoint import Control
from finrepro.training.engines.deepspeed import collect_trained, inference, is_sharded
from finrepro.training.loop import train

NAMES = tuple({reader.model(name).family: name for name in reversed(MINIATURES)}.values())
TASKS = {"choices": reader.task("tfns", "short"), "text": reader.task("tfns_text")}
METHODS = (("full", "none"), ("lora_r8", "nf4"))
OWN = (("iec_r8", "nf4"), ("houlsby_m64", "nf4"))  # the adapters that are our own layers
STEPS = 4
FEW = {
    "max_steps": STEPS,
    "warmup_steps": 1,
    "global_batch_size": 6,
    "sort_window": 1,
    "max_tokens": 64,
    "max_seq_len": 128,
}


def answers(model: nn.Module, name: str, **changes: Any) -> dict[str, Any]:
    """Every kind of evaluation: rows and scores of choices and of text, one example alone, and
    generated tokens.
    """
    settings = dataclasses.replace(EVALUATION, **{"max_tokens": 256, **changes})
    found: dict[str, Any] = {}
    for kind, task in TASKS.items():
        result = evaluate(
            model, tokenizer(reader.model(name).family), task, real_examples(12), settings, 128
        )
        found[kind] = {"rows": result.rows, "scores": result.scores}
    alone = evaluate(
        model,
        tokenizer(reader.model(name).family),
        TASKS["choices"],
        real_examples(1),
        settings,
        128,
    )
    prompts = [example.ids for example in random_examples(3, count=9)]
    whole = generate(model, prompts, [4] * 9, [-1], 100)
    ended = generate(model, prompts, [4] * 9, [whole[0][2]], 100)
    return {**found, "alone": alone.rows, "tokens": whole, "ended": ended}


def neighbours(
    batches: Sequence[list[int]], compute: Callable[[list[int]], Any], **options: Any
) -> list[Any]:
    """A mutant: a rank computes the batch that is another's. On one rank it is right."""
    mine = ranks.current().rank
    return share_out(batches, lambda rows: compute(batches[batches.index(rows) - mine]), **options)


def evaluation() -> dict[Any, Any]:
    """Models that are whole on every rank, and the mutant."""
    found: dict[Any, Any] = {}
    for name in NAMES:
        spec = spec_of(name, "lora_r8", "nf4", max_steps=0)
        model = stir(make(spec).model)
        train(model, [], spec, CPU, control(Path()))
        found[name] = answers(model, name)
        found[name, "single rows"] = answers(model, name, max_tokens=1)["choices"]
        log_likelihood.share_out = neighbours
        found[name, "mutant"] = answers(model, name, max_tokens=1)["choices"]
        log_likelihood.share_out = share_out
    return found


def zero(folder: Path) -> dict[Any, Any]:
    """Trained and untrained models: at ZeRO stage 3 on several ranks, else whole. What is
    computed, held and exported.
    """
    import deepspeed

    found: dict[Any, Any] = {}
    stage = 3 if ranks.current().world_size > 1 else 0
    for name in NAMES:
        for adapter, quantizer in METHODS:
            for steps in (0, STEPS) if adapter != "full" else (STEPS,):
                spec = spec_of(
                    name, adapter, quantizer, **{**FEW, "max_steps": steps, "zero_stage": stage}
                )
                model = make(spec).model
                with deepspeed.zero.GatheredParameters(
                    list(model.parameters()), modifier_rank=0
                ):  # it may be loaded in parts
                    stir(model)
                if not steps:  # as the kinds of adapters that are not trained
                    model.requires_grad_(False)
                train(
                    model,
                    random_examples(0, 30),
                    spec,
                    CPU,
                    control(folder / f"{name}-{adapter}-{steps}"),
                )
                names = [
                    key for key, parameter in model.named_parameters() if parameter.requires_grad
                ]
                largest: list[int] = [0]
                with inference(model, spec.train, CPU):
                    hooks = [
                        each.register_forward_pre_hook(partial(_measure, model, largest))
                        for each in model.modules()
                    ]
                    result = answers(model, name)
                    for hook in hooks:
                        hook.remove()
                held = sum(parameter.numel() for parameter in model.parameters())
                parts = len(is_sharded(model))
                collect_trained(model)
                weights = {
                    key: value.detach().clone()
                    for key, value in model.named_parameters()
                    if key in names
                }
                found[name, adapter, steps] = {
                    "answers": result,
                    "held": held,
                    "largest": largest[0],
                    "parts": parts,
                    "weights": weights,
                }
    return found


def _measure(model: nn.Module, largest: list[int], *_: Any) -> None:
    """Keep the largest number of parameters that this rank has held at the beginning of a
    module's computation.
    """
    largest[0] = max(largest[0], sum(parameter.numel() for parameter in model.parameters()))


def training(folder: Path) -> dict[Any, Any]:
    """Losses, norms and weights under both engines, whole and interrupted."""
    found: dict[Any, Any] = {}
    for engine in ("deepspeed", "ddp"):
        for name, (adapter, quantizer), layout in zip(
            NAMES * 2, METHODS + METHODS[::-1], ("padded", "bins") * 2, strict=True
        ):
            spec = spec_of(name, adapter, quantizer, **FEW, layout=layout, engine=engine)
            key = f"{engine}-{name}-{adapter}-{layout}"
            found[key] = trained(spec, control(folder / key))
            seen: list[Any] = []
            try:
                trained(
                    spec, control(folder / f"{key}-cut", lambda seen=seen: len(seen) >= 2, seen)
                )
            except Interrupted:
                torch.rand(3)
            found[f"{key}-resumed"] = trained(spec, control(folder / f"{key}-cut"))
    return found


def own(folder: Path) -> dict[Any, Any]:
    """Losses, and what the first rank exports, of our own adapters at every ZeRO stage and under
    DDP.
    """
    found: dict[Any, Any] = {}
    for name in NAMES:
        for adapter, quantizer in OWN:
            for engine, stage in (("ddp", 0), *(("deepspeed", stage) for stage in range(4))):
                spec = spec_of(name, adapter, quantizer, **FEW, engine=engine, zero_stage=stage)
                model = make(spec).model
                steps = train(
                    model, random_examples(0, 30), spec, CPU, control(folder / "checkpoints")
                ).losses
                with inference(model, spec.train, CPU):
                    result = generate(
                        model,
                        [example.ids for example in random_examples(3, count=3)],
                        [4] * 3,
                        [-1],
                        100,
                    )
                collect_trained(model)
                tensors: dict[str, Any] = {}
                if ranks.current().is_main:
                    where = folder / f"{name}-{adapter}-{engine}-{stage}"
                    where.mkdir(parents=True)
                    adapter_of(spec.adapter).export(model, where)
                    (file,) = where.glob("*.safetensors")
                    tensors = load_file(file)
                losses = [row["loss"] for row in steps]
                found[name, adapter, engine, stage] = {
                    "losses": losses,
                    "tokens": result,
                    "tensors": tensors,
                }
    return found


def trained(spec: RunSpec, how: Control) -> dict[str, Any]:
    """One training run."""
    model = make(spec).model
    losses = train(model, random_examples(0, 30), spec, CPU, how).losses
    kept = ("step", "loss", "grad_norm")
    weights = {
        key: value.detach().clone()
        for key, value in model.named_parameters()
        if value.requires_grad
    }
    return {"losses": [[row[each] for each in kept] for row in losses], "weights": weights}


def control(
    folder: Path, stop: Callable[[], bool] = lambda: False, seen: list[Any] | None = None
) -> Control:
    """No clock: checkpoints are written on request only."""
    return Control((seen if seen is not None else []).append, stop, folder, checkpoint_seconds=1e9)


def main(part: str, folder: Path) -> None:
    """Run a part and save what it gives."""
    process.quiet_environment()
    process.setup(0, 1)
    here = ranks.current()
    found = (
        evaluation()
        if part == "evaluation"
        else {"zero": zero, "training": training, "own": own}[part](folder / str(here.world_size))
    )
    torch.save(found, folder / f"{here.world_size}-{here.rank}.pt")
    ranks.leave_process_group()
    process.end(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
