"""Which layout of a step's micro-batches is faster here: measured before training, on the run's own
examples and device.

On CPUs a bin of many short segments costs a call of attention for each, and padding between
examples of like length costs little; on GPUs one variable-length call takes a whole bin. `layout:
fastest` measures which holds. Every layout gives the same loss and gradients
(finrepro.data.packing), so that the choice changes rounding and time only; it is recorded with the
measured seconds.
"""

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from finrepro.catalogue.spec import RunSpec, Train
from finrepro.data.batches import Sample
from finrepro.data.packing import LAYOUTS
from finrepro.evidence import files, strict_json
from finrepro.evidence.schema_cell import Layout
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.runtime import ranks
from finrepro.training.checkpoint import Control
from finrepro.training.engines.deepspeed import is_sharded
from finrepro.training.steps import OrderedSamples, micro_batches, steps_from

USUAL = "bins"  # where nothing can be measured, and where the difference is small
# another layout has to be so many times faster: a choice within the noise of a clock would differ
# from run to run
MARGIN = 1.05
STEPS, TURNS = 2, 2  # steps that are measured, evenly spread over the run, and how often
NOTE = "layout.json"


def choose_layout(
    spec: RunSpec, model: nn.Module, data: Sequence[Sample], device: torch.device, control: Control
) -> tuple[RunSpec, Layout]:
    """The cell with a layout, and its record: `used`, and each layout's `seconds` for a step, empty
    where none was measured.

    An interrupted run goes on with the layout that it began with. All ranks call it.
    """
    if spec.train.layout != "fastest" or not spec.train.max_steps:
        return spec, {"used": spec.train.layout if spec.train.max_steps else None, "seconds": {}}
    ranks.start_process_group(device)
    note = control.checkpoints / NOTE
    layout = _noted(note, control.made_by) or _measured(spec, model, data, device, control)
    if ranks.current().is_main:
        note.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(note, {**layout, "made_by": control.made_by})
    return replace(spec, train=replace(spec.train, layout=cast(Any, layout["used"]))), layout


def _measured(
    spec: RunSpec, model: nn.Module, data: Sequence[Sample], device: torch.device, control: Control
) -> Layout:
    # Only an engine computes with shards, and windows of running text need bins.
    if is_sharded(model) or isinstance(data, OrderedSamples):
        return {"used": USUAL, "seconds": {}}
    control.emit({"event": "phase", "phase": "layout"})
    control.phases.begin("load")
    seconds = step_seconds(spec, model, data, device)
    control.phases.forget()  # what the slower layout took is no part of the run
    best = min(seconds, key=lambda name: seconds[name])
    return {"used": best if seconds[best] * MARGIN < seconds[USUAL] else USUAL, "seconds": seconds}


def step_seconds(
    spec: RunSpec, model: nn.Module, data: Sequence[Sample], device: torch.device
) -> dict[str, float]:
    """Median seconds of the forward and backward passes of a step in each layout, side by side, the
    slowest rank's.

    Leaves no gradient behind, and the generators as they were.
    """
    lengths = [len(example.ids) for example in data]
    numbers = sorted({index * spec.train.max_steps // STEPS for index in range(STEPS)})
    steps = [next(steps_from(number, lengths, spec.train, spec.seed))[1] for number in numbers]
    lm = SupervisedLM(model)
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for turn in range(TURNS + 1):
            for name in LAYOUTS:
                seconds = _turn(
                    lm, steps, data, lengths, replace(spec.train, layout=cast(Any, name)), device
                )
                if turn:  # the first one warms up
                    times[name].append(seconds / len(steps))
    medians = torch.tensor(
        [statistics.median(times[name]) for name in LAYOUTS], dtype=torch.float64, device=device
    )
    if dist.get_world_size() > 1:
        dist.all_reduce(medians, dist.ReduceOp.MAX)
    return dict(zip(LAYOUTS, medians.tolist(), strict=True))


def _turn(
    lm: SupervisedLM,
    steps: Sequence[list[int]],
    data: Sequence[Sample],
    lengths: Sequence[int],
    settings: Train,
    device: torch.device,
) -> float:
    """Seconds of some steps, batches made from examples included."""
    began = time.perf_counter()
    for rows in steps:
        for batch in micro_batches(rows, data, lengths, settings, ranks.current()):
            lm(batch.to(device)).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    lm.zero_grad(set_to_none=True)
    return seconds


def _noted(note: Path, made_by: str) -> Layout | None:
    """What an earlier attempt of the same maker chose; on every rank what the first one reads."""
    message: list[Any] = [None]
    if ranks.current().is_main and note.is_file():
        with contextlib.suppress(ValueError):
            message = [strict_json.loads(note.read_text(encoding="utf-8"))]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(message)
    earlier = message[0]
    if not isinstance(earlier, dict) or earlier.get("made_by") != made_by:
        return None
    return {"used": earlier["used"], "seconds": earlier["seconds"]}
