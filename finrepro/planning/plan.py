"""What will happen to each cell before anything runs: kept, run, skipped or refused, why, and about how long it takes."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from finrepro.catalogue.cells import Cell
from finrepro.catalogue.spec import Model, RunSpec, Scale
from finrepro.data import files as data
from finrepro.data.corpora import place as corpora
from finrepro.errors import UsageError
from finrepro.evidence import store
from finrepro.evidence.place import Place
from finrepro.methods.layers.linear import block_sizes, depth
from finrepro.planning import availability
from finrepro.sizes import memory

Action = Literal["run", "keep", "skip", "refuse"]
GIB = 2**30
TOKENS_PER_EXAMPLE = 45  # of the sentiment sets, with a short prompt; only for the estimate of time
FLOPS_PER_THREAD = 6e10  # sustained by small fp32 matrices on one core of the machine in docs/log.md
FLOPS_PER_GPU = 1.5e14


@dataclass(frozen=True)
class Step:
    """A run and what is to be done about it. `reason` says why it is skipped, refused or run again."""

    spec: RunSpec
    action: Action
    state: str
    reason: str = ""
    is_base: bool = False
    base: RunSpec | None = None


@dataclass(frozen=True)
class Machine:
    """What this machine can hold: memory of its host and of its smallest GPU (0 without one)."""

    memory_bytes: int
    gpu_bytes: int
    gpu_name: str = ""
    gpus: int = 0


@cache
def machine() -> Machine:
    """Look at the host and at its GPUs, without loading a GPU library."""
    import psutil

    host = psutil.virtual_memory().total
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") and visible not in ("", "-1"):
        query = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
        query += [f"--id={visible}"] if visible else []
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        lines = [line.split(",", 1) for line in answer.stdout.strip().splitlines()] if answer.returncode == 0 else []
        if lines:
            smallest = min(lines, key=lambda line: float(line[0]))
            return Machine(host, int(float(smallest[0]) * 2**20), smallest[1].strip(), len(lines))
    return Machine(host, 0)


def check_jobs(jobs: int, steps: list[Step]) -> None:
    """Raise `UsageError` where cells that run at a time would meet on a GPU: a job has a card of its own."""
    cards = machine().gpus
    widest = max((step.spec.world_size for step in steps if step.action == "run"), default=1)
    if cards and jobs > 1 and (jobs > cards or widest > 1):
        reason = f"this machine has {cards} GPU(s)" if jobs > cards else f"one of the cells takes {widest}"
        raise UsageError(f"--jobs {jobs}: every job needs a GPU of its own, and {reason}.")


def cards(jobs: int) -> list[dict[str, str]]:
    """The environment that gives each of several jobs a GPU of its own; nothing to give where there is one job or no GPU."""
    if jobs == 1 or not machine().gpus:
        return [{}] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(jobs)))
    return [{"CUDA_VISIBLE_DEVICES": card.strip()} for card in visible.split(",")[:jobs]]


def block_linear_parameters(model: Model) -> int:
    """Weights of the linear layers in the blocks: what a quantizer stores in fewer bits."""
    return depth(model) * sum(inputs * outputs for inputs, outputs in block_sizes(model).values())


def base_bytes(spec: RunSpec) -> int:
    """Bytes of the base as it is stored, quantization constants included: exact, from the architecture."""
    return memory.stored_bytes(spec.model, spec.quantizer)


def sizes(spec: RunSpec) -> dict[str, int]:
    """What of a cell's costs needs no run: trained parameters, bytes of the base, and of the numbers in the file that training writes.

    The file has a header besides, about a hundred bytes a tensor. A whole model is written in its own dtype, an adapter in float32.
    """
    module, bits = spec.adapter.module("adapters"), 16 if spec.model.dtype == "bfloat16" else 32
    trained = module.trainable_parameters(spec.model, spec.adapter.config)
    written = getattr(module, "exported_parameters", None)
    numbers = written(spec.model, spec.adapter.config, spec.train.max_steps) if written else trained
    width = bits // 8 if getattr(module, "WHOLE_MODEL", False) else 4
    return {
        "total_params": spec.model.parameters,
        "trainable_params": trained,
        "base_bytes": base_bytes(spec),
        "trained_file_bytes": numbers * width,
    }


def needed_bytes(spec: RunSpec) -> int:
    """Memory of one device to train the cell: base as stored, trained parameters in fp32 with gradient and two moments, and activations of
    a checkpointed forward pass (QLoRA's and ZeRO's formulas: 4 + 4 + 8 bytes a trained parameter; stage 1 divides the moments by the
    number of devices, 2 also the gradients, 3 everything but the activations). An estimate for refusing what cannot fit, not a prediction.
    """
    shape, dtype_bits = spec.model.architecture, 16 if spec.model.dtype == "bfloat16" else 32
    base = base_bytes(spec)
    trained = spec.adapter.module("adapters").trainable_parameters(spec.model, spec.adapter.config)
    width = shape["n_embd" if spec.model.family == "gpt2" else "hidden_size"]
    kept = 1 if spec.train.activation_checkpointing else 16
    tokens = spec.train.max_tokens if spec.train.max_steps else spec.evaluation.max_tokens
    activations = tokens * width * (depth(spec.model) * kept + 20) * dtype_bits / 8
    stage, ranks = spec.train.zero_stage, spec.world_size
    weights = 4 * trained / (ranks if stage == 3 else 1)
    gradients = 4 * trained / (ranks if stage >= 2 else 1)
    moments = 8 * trained / (ranks if stage >= 1 else 1)
    return int(base / (ranks if stage == 3 else 1) + weights + gradients + moments + activations)


def estimated_seconds(spec: RunSpec, place: Place) -> float:
    """About how long the cell takes: as long as it took last time in this store, else from its FLOPs."""
    before = place.store.result(spec.run_id)
    if before and before["status"] == store.DONE:
        return float(before["ended"] - before["started"])
    windows = any(corpora.is_running_text(part.task) for part in spec.train_on.parts)
    tokens = spec.train.max_seq_len if windows else TOKENS_PER_EXAMPLE
    trained = 6 * spec.train.max_steps * spec.train.global_batch_size * tokens
    scored = (
        TOKENS_PER_EXAMPLE * (1 + len(spec.stored_as)) * sum(2 * file.rows for file in _scored_files(spec) if file.rows)
    )
    threads = min(spec.threads, len(os.sched_getaffinity(0)))
    speed = FLOPS_PER_GPU if machine().gpu_bytes else FLOPS_PER_THREAD * threads
    return 3 + spec.model.parameters * (trained + scored) / speed


def _scored_files(spec: RunSpec) -> list[data.File]:
    """The files of the splits that the cell is scored on; a split cut from a larger file is left out."""
    files = [each.dataset.config.files for each in spec.tasks]
    return [roles[spec.evaluation.split] for roles in files if spec.evaluation.split in roles]


def cannot_run(spec: RunSpec, place: Place, ask_hub: bool = False) -> str | None:
    """Why this machine cannot run the cell, in one line; None if it can. With `ask_hub`, weights may still be fetched."""
    devices = machine().gpus or len(os.sched_getaffinity(0))
    if spec.world_size > devices:
        return f"needs {spec.world_size} devices, this machine has {devices}"
    reason = availability.data_of(spec, place)
    if reason:
        return reason
    if spec.model.scale == "smoke":
        return None
    here = machine()
    available, where = (
        (here.gpu_bytes, f"its {here.gpu_name}") if here.gpu_bytes else (here.memory_bytes, "this machine")
    )
    needed = needed_bytes(spec) * (1 if here.gpu_bytes else spec.world_size)  # ranks on a host share its memory
    if needed > available:
        return f"needs {needed / GIB:.1f} GiB, {where} has {available / GIB:.1f}"
    return availability.base_of(spec, place, ask_hub) if spec.weights == "pretrained" else None


def plan(cells: list[Cell], place: Place, keep: bool, ask_hub: bool = False) -> list[Step]:
    """The steps in the order in which they run: bases before the cells that need them. `keep` keeps stale results."""
    steps = [_step(cell.spec, place, keep, ask_hub, cell.refusal, cell.base) for cell in cells]
    needed = {step.base.run_id: step.base for step in steps if step.action == "run" and step.base is not None}
    bases = [_step(base, place, keep, ask_hub, None, None, is_base=True) for base in needed.values()]
    return bases + steps


def _step(
    spec: RunSpec,
    place: Place,
    keep: bool,
    ask_hub: bool,
    refusal: str | None,
    base: RunSpec | None,
    is_base: bool = False,
) -> Step:
    if refusal:
        return Step(spec, "refuse", "refused", refusal, is_base, base)
    state = place.store.state(spec)
    if state == store.DONE or (state == store.STALE and keep):
        return Step(
            spec, "keep", state, "made by other source or packages" if state == store.STALE else "", is_base, base
        )
    reason = cannot_run(spec, place, ask_hub)
    if reason and state == store.STALE:  # evidence that cannot be made again here is not thrown away
        return Step(
            spec, "keep", state, f"made by other source or packages, and cannot be made again: {reason}", is_base, base
        )
    if reason:
        return Step(spec, "skip", store.SKIPPED, reason, is_base, base)
    again = {store.STALE: "its source or packages have changed", store.MISSING: ""}
    return Step(spec, "run", state, again.get(state, f"it {state} before"), is_base, base)


def auto_scale(paper: Callable[[], list[Cell]], place: Place) -> tuple[Scale, str]:
    """`paper` where a GPU is there and at least one of the table's cells can run on it, else `smoke`; and why."""
    here = machine()
    if not here.gpu_bytes:
        return "smoke", "no CUDA device on this machine"
    specs = [cell.spec for cell in paper() if not cell.refusal]
    # What would first be prepared from the hub, during days of pretraining, is not begun without being asked for.
    reasons = [availability.corpora_of(spec, place) or cannot_run(spec, place, ask_hub=True) for spec in specs]
    if None in reasons:
        return "paper", f"{here.gpu_name} found, and at least one cell can run on it"
    return "smoke", f"{here.gpu_name} found, but no cell can run: {reasons[0] if reasons else 'all are refused'}"
