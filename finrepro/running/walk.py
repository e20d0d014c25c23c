"""The walk of one cell: the paper's method section as a program. A rank each calls it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from finrepro.catalogue.spec import RunSpec
from finrepro.data.arriving.growing import Waiting
from finrepro.errors import Diverged, unavailable_if_faulty
from finrepro.evidence.place import Place
from finrepro.models.build import build
from finrepro.running.events import Emit, emit_phase
from finrepro.running.inputs import prepare
from finrepro.running.scoring import evaluate_tasks
from finrepro.running.seal import Walked, seal_finished
from finrepro.runtime import memory, process, ranks
from finrepro.runtime.finite import not_finite
from finrepro.runtime.monitor import Monitor
from finrepro.runtime.phases import Phases
from finrepro.training.checkpoint import Control
from finrepro.training.compilation import expect_compiler
from finrepro.training.layout import choose_layout
from finrepro.training.loop import train


def walk(
    spec: RunSpec,
    place: Place,
    emit: Emit,
    stop_requested: Callable[[], bool],
    waiting: Waiting,
    started: float,
) -> Mapping[str, Any]:
    """setup -> prepare -> build -> train -> evaluate -> seal; the content of result.json."""
    device = process.setup(spec.seed, spec.threads)
    expect_compiler(spec, device)
    memory.reset_peak_memory(device)

    emit_phase(emit, "data")
    phases = Phases(device)
    inputs = prepare(spec, place, waiting)

    emit_phase(emit, "model")
    phases.begin("load")
    with unavailable_if_faulty():
        built = build(spec, inputs.base, device, place.store.cache)

    with Monitor() as monitor:
        folder = place.store.checkpoints(spec.run_id)
        control = Control(emit, stop_requested, folder, inputs.made_by(), phases=phases)
        settled, layout = choose_layout(spec, built.model, inputs.examples, device, control)
        emit_phase(emit, "train")
        trained = train(built.model, inputs.examples, settled, device, control)
        expect_finite(built.model, device)

        emit_phase(emit, "evaluate")
        phases.begin("evaluate")
        evaluated = evaluate_tasks(spec, built.model, inputs, place.store, device, emit)

    emit_phase(emit, "record")
    walked = Walked(
        started, device, inputs, built, layout, trained, evaluated, phases, monitor.samples
    )
    return seal_finished(spec, place.store, walked, emit)


def expect_finite(model: nn.Module, device: torch.device) -> None:
    """Raise `Diverged` on every rank when a weight holds NaN or an infinity on any: the last
    update, which no loss has seen, may have made one.
    """
    name = not_finite(model)
    if ranks.any_rank(name is not None, device):
        weight = name or "a weight of another rank"
        raise Diverged(f"diverged: {weight} holds NaN or an infinity after the last step.")
