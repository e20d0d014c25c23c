"""Checkpoints of an unfinished run: what training carries along, saved whole, and resumed only
by the same maker.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from finrepro.errors import CellFailed
from finrepro.evidence.files import write_json
from finrepro.evidence.manifest import NAME as MANIFEST
from finrepro.evidence.manifest import Damaged, damaged_files, file_digest, write_manifest
from finrepro.evidence.sealed import read_sealed, sealed
from finrepro.runtime import ranks
from finrepro.runtime.phases import Phases
from finrepro.runtime.ranks import any_rank
from finrepro.training.engines.base import Engine
from finrepro.training.progress import Trained

LATEST = "latest"


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
        write_manifest(folder / tag)
        for path in (folder / tag).rglob("*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a power cut must not leave a pointer to half a checkpoint
        pointer = {"tag": tag, "made_by": control.made_by}
        pointer["manifest"] = file_digest(folder / tag / MANIFEST)
        write_json(folder / LATEST, sealed(pointer), durable=True)
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

    `load_adapter` gets what the adapter's `state` gave, once the weights are there. All ranks call
    it. A checkpoint that is not what was saved is set aside before a byte of it is used, and the
    run starts anew. Raises `CellFailed` for one that is whole and cannot be read.
    """
    pointer, faults = _latest(control.checkpoints)
    if any_rank(bool(faults), control.phases.device):
        trained.remarks.append(set_aside(control, faults))
        return 0
    if pointer is None or pointer["made_by"] != control.made_by:
        return 0
    try:
        state = engine.load(control.checkpoints, pointer["tag"])
    except Exception as error:  # whatever torch or DeepSpeed say
        set_aside(control, [])
        raise CellFailed(
            f"its checkpoint cannot be read ({type(error).__name__}) and was set aside: run again."
        ) from error
    vars(trained).update(state["trained"])
    load_adapter(state["adapter"])
    control.phases.carry(state["peaks"])
    torch.set_rng_state(state["torch_rng"].cpu())
    if "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"].cpu())
    return len(trained.losses)


def _latest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The pointer to the latest checkpoint, None where there is none; and what is damaged of it,
    found by the first rank.
    """
    try:
        pointer = read_sealed(folder / LATEST)
    except Damaged as error:
        return None, [str(error)]
    if pointer is None or not ranks.current().is_main:
        return pointer, []
    manifest = folder / pointer["tag"] / MANIFEST
    if not manifest.is_file() or file_digest(manifest) != pointer["manifest"]:
        return None, [f"{pointer['tag']}/{MANIFEST}"]
    return pointer, [f"{pointer['tag']}/{name}" for name in damaged_files(manifest.parent)]


def set_aside(control: Control, faults: Sequence[str]) -> str:
    """Move a run's checkpoints away, beside where they were; a sentence that says so. All ranks
    call it, and the first one moves.
    """
    folder = control.checkpoints
    aside = next(
        path
        for number in count(1)
        if not (path := folder.with_name(f"{folder.name}.damaged-{number}")).exists()
    )
    why = f" was damaged ({', '.join(faults)}) and" if faults else ""
    said = f"its checkpoint{why} was set aside: it started anew"
    if ranks.current().is_main:
        folder.rename(aside)
        print(f"finrepro: {said}; see {aside}", file=sys.stderr)
    return said
