"""The one training loop. It knows no adapter, quantizer, task or engine by name."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import nn

from finrepro.catalogue.spec import RunSpec, Train
from finrepro.data import packing
from finrepro.data.batches import COLLATE, Batch, Sample, empty
from finrepro.errors import CellFailed
from finrepro.runtime import process
from finrepro.training import compilation, rates
from finrepro.training.checkpoint import Control, Trained, resume, save_checkpoint
from finrepro.training.engines.start import Engine, make_whole, start_engine
from finrepro.training.hooks import Hooks

Order = Callable[[int, int, int], packing.Rows]


class Diverged(CellFailed):
    """The loss or the gradient is not a finite number."""


class Interrupted(Exception):
    """Asked to stop; after a step with a checkpoint, while text is waited for without."""


def learning_rate(step: int, settings: Train) -> float:
    """Linear warm-up from 0 over `warmup_steps`, then constant, linear to 0, or a half cosine to 0 at `max_steps`."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    return settings.lr * ((1 - progress) if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def steps_from(
    first: int, lengths: Sequence[int], settings: Train, seed: int, order: Order | None = None
) -> Iterator[tuple[int, packing.Rows]]:
    """(step, example indices) from step `first` to the last: any step can be reached without replaying those before it.

    `order` is that of data with one of its own (finrepro.data.corpora.windows): step, global batch size and seed to rows.
    """
    if order is not None:
        for step in range(first, settings.max_steps):
            yield step, order(step, settings.global_batch_size, seed)
        return
    per_epoch = packing.num_steps(len(lengths), settings.global_batch_size, settings.sort_window)
    epoch, steps = -1, []
    for step in range(first, settings.max_steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            steps = packing.steps_of_epoch(lengths, settings.global_batch_size, settings.sort_window, seed, epoch)
        yield step, steps[step % per_epoch]


def train(model: nn.Module, data: Sequence[Sample], spec: RunSpec, device: torch.device, control: Control) -> Trained:
    """Train `model` in place on `data` for `spec.train.max_steps` optimizer steps, resuming from a checkpoint if there is one.

    The loss is the sum over supervised tokens divided by their number in the global batch, whatever the layout and the number of ranks.
    At ZeRO stage 3 on several ranks its parameters are left in parts (`finrepro.training.engines.start.inference` computes with them). With `max_steps` 0
    nothing happens, but that the ranks find one another. Raises `Diverged` on a non-finite loss or gradient, `Interrupted` after saving
    when a stop was requested.
    """
    settings, here = spec.train, process.ranks()
    if settings.max_steps == 0:
        if here.world_size > 1:
            process.start_process_group(device)
        return Trained()
    lengths = getattr(data, "lengths", None) or [len(example.ids) for example in data]
    hooks = Hooks(spec.adapter, settings.optimizer, model, settings.max_steps)
    engine = start_engine(model, settings, device, rates.scale_of(spec.adapter), hooks.extra_loss)
    rate_factor = rates.factor_of(spec.adapter, settings.max_steps)
    trained = Trained()
    first = resume(engine, control, trained, hooks.load_state)
    hooks.start(engine)
    order = getattr(data, "rows", None)
    with ExitStack() as until_the_end:
        until_the_end.callback(engine.close)
        if settings.compile and first < settings.max_steps:
            _, rows = next(steps_from(first, lengths, settings, spec.seed, order))
            control.phases.begin("compile")
            batch = micro_batches(rows, data, lengths, settings, here)[0].to(device)
            keep = trained.compilation.append
            until_the_end.enter_context(compilation.compiled(model, batch, spec.model.dtype, keep))
        last_save, began, pause = time.monotonic(), time.monotonic() - trained.seconds, control.checkpoint_seconds
        for step, rows in steps_from(first, lengths, settings, spec.seed, order):
            rate = learning_rate(step, settings) * rate_factor(step)
            rates.set_rate(engine.param_groups, rate)
            supervised = sum(data[row].num_supervised for row in rows)
            control.phases.begin("backward")
            batches = micro_batches(rows, data, lengths, settings, here)

            def before_update(step: int = step) -> None:
                control.phases.begin("step")
                hooks.before_step(step)

            loss, norm = optimizer_step(engine, batches, supervised, device, before_update)
            trained.seconds = time.monotonic() - began
            trained.tokens += sum(lengths[row] for row in rows)
            trained.supervised_tokens += supervised
            trained.computed_tokens += computed_tokens(rows, lengths, settings, here.world_size)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(f"diverged at step {step}: loss {loss}, gradient norm {norm}.")
            hooks.after_step(step)
            trained.losses.append(
                {"step": step, "loss": loss, "grad_norm": norm, "lr": rate, "seconds": trained.seconds}
            )
            control.report({"event": "step", "step": step + 1, "steps": settings.max_steps, "loss": loss,
                            "tokens_per_second": trained.tokens / trained.seconds})  # fmt: skip
            stop = process.any_rank(control.stop_requested(), device)
            if stop or process.any_rank(time.monotonic() - last_save > pause, device):
                began_save = time.monotonic()
                control.phases.begin("save")
                save_checkpoint(engine, control, trained, hooks.state())
                last_save = time.monotonic()
                # Saving takes at most a twentieth of the time, however large the model.
                pause = max(control.checkpoint_seconds, 20 * (last_save - began_save))
                if stop:
                    raise Interrupted(f"stopped after step {step + 1} of {settings.max_steps}; a checkpoint is saved")
    if here.world_size == 1:  # ZeRO-3's parts of one rank are the whole
        make_whole(model)
    return trained


def micro_batches(
    rows: packing.Rows, data: Sequence[Sample], lengths: Sequence[int], settings: Train, here: process.Ranks
) -> list[Batch]:
    """This rank's micro-batches of a step; ranks with fewer than the busiest one get empty ones to keep step with it."""
    lay_out = packing.LAYOUTS[settings.layout]
    parts = [
        lay_out(packing.rank_rows(rows, lengths, rank, here.world_size), lengths, settings.max_tokens)
        for rank in range(here.world_size)
    ]
    batches = [COLLATE[settings.layout]([data[row] for row in micro]) for micro in parts[here.rank]]
    return batches + [empty()] * (max(map(len, parts)) - len(batches))


def computed_tokens(rows: packing.Rows, lengths: Sequence[int], settings: Train, world_size: int) -> int:
    """Tokens of a step that go through the model, padding included, over all ranks."""
    lay_out = packing.LAYOUTS[settings.layout]
    parts = [packing.rank_rows(rows, lengths, rank, world_size) for rank in range(world_size)]
    micro = [batch for part in parts for batch in lay_out(part, lengths, settings.max_tokens)]
    return packing.computed_tokens(micro, lengths, settings.layout)


def optimizer_step(
    engine: Engine,
    batches: Sequence[Batch],
    supervised: int,
    device: torch.device,
    before_update: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Forward and backward over the micro-batches, one update; the loss of the whole global batch, and its gradient's norm.

    Engines average gradients over ranks, so each rank's share is scaled by their number to make the average a sum.
    """
    world_size = dist.get_world_size()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in enumerate(batches):
        total += engine.backward(batch.to(device), world_size / supervised, index == len(batches) - 1) / world_size
    before_update()
    norm = engine.update()
    if world_size > 1:
        dist.all_reduce(total)
    return float(total), float(norm)
