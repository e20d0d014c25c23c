"""The one training loop. It knows no adapter, quantizer, task or engine by name."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import nn

from finrepro.catalogue.spec import RunSpec
from finrepro.data.batches import Batch, Sample
from finrepro.errors import Diverged, Interrupted
from finrepro.kinds import adapter_of
from finrepro.runtime import ranks
from finrepro.training import compilation, rates
from finrepro.training.checkpoint import Control, resume, save_checkpoint
from finrepro.training.engines.base import Engine
from finrepro.training.engines.deepspeed import make_whole
from finrepro.training.engines.start import start_engine
from finrepro.training.hooks import Hooks
from finrepro.training.progress import Trained
from finrepro.training.schedule import learning_rate
from finrepro.training.steps import computed_tokens, lengths_of, micro_batches, order_of, steps_from


def train(
    model: nn.Module, data: Sequence[Sample], spec: RunSpec, device: torch.device, control: Control
) -> Trained:
    """Train `model` in place on `data` for `spec.train.max_steps` optimizer steps, resuming from a
    checkpoint if there is one.

    The loss is the sum over supervised tokens divided by their number in the global batch, whatever
    the layout and the number of ranks. At ZeRO stage 3 on several ranks its parameters are left
    sharded (`finrepro.training.engines.deepspeed.inference` computes with them). With `max_steps`
    0 nothing is trained, and the ranks join their process group. Raises `Diverged` on a non-finite
    loss or gradient, `Interrupted` after saving when a stop was requested.
    """
    settings, rank = spec.train, ranks.current()
    if settings.max_steps == 0:
        if rank.world_size > 1:
            ranks.start_process_group(device)
        return Trained()
    lengths, order = lengths_of(data), order_of(data)
    hooks = Hooks(spec.adapter, settings.optimizer, model, settings.max_steps)
    adapter = adapter_of(spec.adapter)
    engine = start_engine(model, settings, device, adapter.lr_scale, adapter.extra_loss)
    trained = Trained()
    first = resume(engine, control, trained, hooks.load_state)
    hooks.start(engine)
    with ExitStack() as until_the_end:
        until_the_end.callback(engine.close)
        if settings.compile and first < settings.max_steps:
            _, rows = next(steps_from(first, lengths, settings, spec.seed, order))
            control.phases.begin("compile")
            batch = micro_batches(rows, data, lengths, settings, rank)[0].to(device)
            until_the_end.enter_context(
                compilation.compiled(model, batch, spec.model.dtype, trained.compilation.append)
            )
        last_save, began, pause = (
            time.monotonic(),
            time.monotonic() - trained.seconds,
            control.checkpoint_seconds,
        )
        for step, rows in steps_from(first, lengths, settings, spec.seed, order):
            lr = learning_rate(step, settings) * adapter.lr_factor(step, settings.max_steps)
            rates.set_rate(engine.param_groups, lr)
            supervised = sum(data[row].num_supervised for row in rows)
            control.phases.begin("backward")
            batches = micro_batches(rows, data, lengths, settings, rank)

            def before_update(step: int = step) -> None:
                control.phases.begin("step")
                hooks.before_step(step)

            loss, norm = optimizer_step(engine, batches, supervised, device, before_update)
            trained.seconds = time.monotonic() - began
            trained.tokens += sum(lengths[row] for row in rows)
            trained.supervised_tokens += supervised
            trained.computed_tokens += computed_tokens(rows, lengths, settings, rank.world_size)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(f"diverged at step {step}: loss {loss}, gradient norm {norm}.")
            hooks.after_step(step)
            trained.losses.append(
                {
                    "step": step,
                    "loss": loss,
                    "grad_norm": norm,
                    "lr": lr,
                    "seconds": trained.seconds,
                }
            )
            control.emit(
                {
                    "event": "step",
                    "step": step + 1,
                    "steps": settings.max_steps,
                    "loss": loss,
                    "tokens_per_second": trained.tokens / trained.seconds,
                }
            )
            stop = ranks.any_rank(control.stop_requested(), device)
            if stop or ranks.any_rank(time.monotonic() - last_save > pause, device):
                began_save = time.monotonic()
                control.phases.begin("save")
                save_checkpoint(engine, control, trained, hooks.state())
                last_save = time.monotonic()
                # Saving takes at most a twentieth of the time, however large the model.
                pause = max(control.checkpoint_seconds, 20 * (last_save - began_save))
                if stop:
                    raise Interrupted(
                        f"stopped after step {step + 1} of {settings.max_steps}; a checkpoint is "
                        "saved"
                    )
    if rank.world_size == 1:  # ZeRO-3's shards of one rank are the whole model
        make_whole(model)
    return trained


def optimizer_step(
    engine: Engine,
    batches: Sequence[Batch],
    supervised: int,
    device: torch.device,
    before_update: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Forward and backward over the micro-batches, one update; the loss of the whole global batch,
    and its gradient's norm.

    Engines average gradients over ranks, so each rank's loss is scaled by their number to make the
    average a sum.
    """
    world_size = dist.get_world_size()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in enumerate(batches):
        total += (
            engine.backward(batch.to(device), world_size / supervised, index == len(batches) - 1)
            / world_size
        )
    before_update()
    norm = engine.update()
    if world_size > 1:
        dist.all_reduce(total)
    return float(total), float(norm)
