"""Checkpoints of an unfinished run: what training carries along, saved whole, and resumed only
by the same maker.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from finrepro.errors import CellFailed
from finrepro.evidence import strict_json
from finrepro.runtime import ranks
from finrepro.runtime.phases import Phases
from finrepro.training.engines.base import Engine
from finrepro.training.progress import Trained


@dataclass(frozen=True)
class Control:
    """How the loop talks to its surroundings: events out, a request to stop in, and where
    checkpoints go. `made_by` names source, packages and base: a checkpoint of others is not
    resumed.
    """

    emit: Callable[[dict[str, Any]], None]
    stop_requested: Callable[[], bool]
    checkpoints: Path
    made_by: str = ""
    checkpoint_seconds: float = 60.0
    phases: Phases = field(default_factory=lambda: Phases(torch.device("cpu")))


def save_checkpoint(
    engine: Engine, control: Control, trained: Trained, adapter: Any = None
) -> None:
    """Weights, optimizer, generators and what the adapter's own `state` gave, after the last
    finished step.

    The older checkpoint goes when the new one is whole.
    """
    folder, tag = control.checkpoints, f"step{len(trained.losses)}"
    state = {"trained": vars(trained), "adapter": adapter, "torch_rng": torch.get_rng_state()}
    state["peaks"] = control.phases.over_ranks()
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    engine.save(folder, tag, state)
    if ranks.current().is_main:
        for path in (folder / tag).rglob("*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a power cut must not leave a pointer to half a checkpoint
        pointer = folder / "latest.partial"
        pointer.write_text(strict_json.dumps({"tag": tag, "made_by": control.made_by}))
        pointer.replace(folder / "latest")
        for old in folder.glob("step*"):
            if old.name != tag:
                shutil.rmtree(old, ignore_errors=True)
    if dist.get_world_size() > 1:
        dist.barrier()


def resume(
    engine: Engine,
    control: Control,
    trained: Trained,
    load_adapter: Callable[[Any], None] = lambda _: None,
) -> int:
    """Load the latest checkpoint into engine and `trained`; the next step, 0 without a checkpoint
    of the same maker.

    `load_adapter` gets what the adapter's `state` gave, once the weights are there. Raises
    `CellFailed` when it cannot be read; it is then removed, and the next attempt starts anew.
    """
    try:
        pointer = strict_json.loads((control.checkpoints / "latest").read_text())
    except (OSError, ValueError):
        return 0
    if pointer["made_by"] != control.made_by:
        return 0
    try:
        state = engine.load(control.checkpoints, pointer["tag"])
        vars(trained).update(state["trained"])
    except Exception as error:  # whatever torch, pickle or DeepSpeed say of a damaged file
        shutil.rmtree(control.checkpoints, ignore_errors=True)
        raise CellFailed(
            f"its checkpoint was damaged ({type(error).__name__}) and has been removed: run again."
        ) from None
    load_adapter(state["adapter"])
    control.phases.carry(state["peaks"])
    torch.set_rng_state(state["torch_rng"].cpu())
    if "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"].cpu())
    return len(trained.losses)
