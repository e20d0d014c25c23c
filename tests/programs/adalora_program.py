"""AdaLoRA under every engine, as a rank of tests/methods/adapters/test_adalora.py runs it:
`python adalora_program.py folder`. Each rank leaves `<ranks>-<rank>.pt` in the folder."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from fixtures.model import CPU, MINIATURES, make, random_examples, spec_of
from steps_program import ENGINES, control

from finrepro.catalogue import reader
from finrepro.catalogue.spec import RunSpec
from finrepro.evaluation.generation import generate
from finrepro.methods.adapters import adalora
from finrepro.runtime import process, ranks
from finrepro.settings import Choice
from finrepro.training.engines.deepspeed import collect_trained, inference
from finrepro.training.loop import train

STEPS = 10
FEW = {
    "max_steps": STEPS,
    "warmup_steps": 1,
    "global_batch_size": 6,
    "sort_window": 1,
    "max_tokens": 64,
    "lr": 3e-3,
}
SHORT = {
    "init_r": 4,
    "target_r": 2,
    "lora_alpha": 8,
    "tinit": 1,
    "tfinal": 3,
    "deltaT": 2,
}  # chooses after steps 2, 4, 6, 7
# (engine, ZeRO stage, quantizer)
CELLS = (*((*each, "none") for each in ENGINES), ("ddp", 0, "nf4"), ("deepspeed", 3, "nf4"))


def settings(**changes: Any) -> Choice:
    """The catalogue's entry with another schedule."""
    config = dataclasses.asdict(reader.adapter("adalora_r8").config)
    return Choice(name="adalora", kind="adalora", config=adalora.Config(**config | SHORT | changes))


def spec(
    name: str = MINIATURES[1],
    engine: Any = "ddp",
    stage: int = 0,
    quantizer: str = "none",
    adapter: Any = None,
    **changes: Any,
) -> RunSpec:
    return spec_of(
        name, adapter or settings(), quantizer, engine=engine, zero_stage=stage, **FEW | changes
    )


def run(cell: RunSpec, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The trained model; its losses, what it says, its last choice of triplets and its weights."""
    model: Any = make(cell).model
    losses = [
        row["loss"]
        for row in train(
            model, random_examples(0, 40), cell, CPU, control(folder, **options)
        ).losses
    ]
    with inference(model, cell.train, CPU):
        tokens = generate(
            model, [example.ids for example in random_examples(3, count=3)], [4] * 3, [-1], 100
        )
    collect_trained(model)
    weights = {
        name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad
    }
    return model, {
        "losses": losses,
        "tokens": tokens,
        "kept": dict(model.allocation.masks),
        "weights": weights,
    }


def main(folder: Path) -> None:
    """Every engine, on full precision and in 4 bits."""
    process.quiet_environment()
    process.setup(0, 1)
    here = ranks.current()
    found = {
        (engine, stage, quantizer): run(
            spec(engine=engine, stage=stage, quantizer=quantizer), folder / "checkpoints"
        )[1]
        for engine, stage, quantizer in CELLS
    }
    torch.save(found, folder / f"{here.world_size}-{here.rank}.pt")
    ranks.leave_process_group()
    process.end(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
