"""The one training loop, on DeepSpeed. It knows no adapter, quantizer or task by name."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from finrepro import packing, runtime
from finrepro.batches import COLLATE, Batch, empty
from finrepro.catalogue import deepspeed_config
from finrepro.checkpoint import Control, Trained, resume, save_checkpoint
from finrepro.errors import CellFailed
from finrepro.layers.supervised import SupervisedLM
from finrepro.spec import RunSpec, Train
from finrepro.tokens import Encoded


class Diverged(CellFailed):
    """The loss or the gradient is not a finite number."""


class Interrupted(Exception):
    """Asked to stop; a checkpoint has been written."""


def learning_rate(step: int, settings: Train) -> float:
    """Linear warm-up from 0 over `warmup_steps`, then constant, linear to 0, or a half cosine to 0 at `max_steps`."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    return settings.lr * ((1 - progress) if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def steps_from(first: int, lengths: Sequence[int], settings: Train, seed: int) -> Iterator[tuple[int, packing.Rows]]:
    """(step, example indices) from step `first` to the last: any step can be reached without replaying those before it."""
    per_epoch = packing.num_steps(len(lengths), settings.global_batch_size, settings.sort_window)
    epoch, steps = -1, []
    for step in range(first, settings.max_steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            steps = packing.steps_of_epoch(lengths, settings.global_batch_size, settings.sort_window, seed, epoch)
        yield step, steps[step % per_epoch]


def train(model: nn.Module, data: Sequence[Encoded], spec: RunSpec, device: torch.device, control: Control) -> Trained:
    """Train `model` in place on `data` for `spec.train.max_steps` optimizer steps, resuming from a checkpoint if there is one.

    The loss is the sum over supervised tokens divided by their number in the global batch, whatever the layout and the number of ranks.
    Raises `Diverged` on a non-finite loss or gradient, `Interrupted` after saving when a stop was requested.
    """
    settings, here = spec.train, runtime.ranks()
    lengths = [len(example.ids) for example in data]
    engine = start_engine(model, settings, device)
    trained = Trained()
    first = resume(engine, control, trained)
    last_save, began, pause = time.monotonic(), time.monotonic() - trained.seconds, control.checkpoint_seconds
    try:
        for step, rows in steps_from(first, lengths, settings, spec.seed):
            rate = learning_rate(step, settings)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            supervised = sum(data[row].num_supervised for row in rows)
            batches = micro_batches(rows, data, lengths, settings, here)
            loss, norm = optimizer_step(engine, batches, supervised, settings.max_grad_norm, device)
            trained.seconds = time.monotonic() - began
            trained.tokens += sum(lengths[row] for row in rows)
            trained.supervised_tokens += supervised
            trained.computed_tokens += computed_tokens(rows, lengths, settings, here.world_size)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(f"diverged at step {step}: loss {loss}, gradient norm {norm}.")
            trained.losses.append(
                {"step": step, "loss": loss, "grad_norm": norm, "lr": rate, "seconds": trained.seconds}
            )
            control.report({"event": "step", "step": step + 1, "steps": settings.max_steps, "loss": loss,
                            "tokens_per_second": trained.tokens / trained.seconds})  # fmt: skip
            stop = agree(control.stop_requested(), device)
            if stop or agree(time.monotonic() - last_save > pause, device):
                began_save = time.monotonic()
                save_checkpoint(engine, control, trained)
                last_save = time.monotonic()
                # Saving takes at most a twentieth of the time, however large the model.
                pause = max(control.checkpoint_seconds, 20 * (last_save - began_save))
                if stop:
                    raise Interrupted(f"stopped after step {step + 1} of {settings.max_steps}; a checkpoint is saved")
    except BaseException:
        engine.destroy()  # without gathering: after an error other ranks may be elsewhere
        raise
    release(engine, model)
    return trained


def release(engine: Any, model: nn.Module) -> None:
    """End the engine and leave `model` whole and usable on every rank: at stage 3 its parameters lie in parts."""
    import deepspeed

    partitioned = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    whole = []
    for parameter in partitioned:
        with deepspeed.zero.GatheredParameters([parameter]):
            whole.append(parameter.data.clone())
    engine.destroy()
    for parameter, data in zip(partitioned, whole, strict=True):
        parameter.data = data


def micro_batches(
    rows: packing.Rows, data: Sequence[Encoded], lengths: Sequence[int], settings: Train, here: runtime.Ranks
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


def start_engine(model: nn.Module, settings: Train, device: torch.device) -> Any:
    """The model under DeepSpeed at the ZeRO stage asked for, with the optimizer of the settings."""
    runtime.start_process_group(device)
    import deepspeed

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = settings.optimizer.module("optimizers").build(named, settings.lr, settings.optimizer.config)
    config = deepspeed_config(settings.zero_stage) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # boundaries are set by hand: steps differ in their number of micro-batches
        "gradient_clipping": settings.max_grad_norm if sharded_or_bf16(named, settings) else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if any(parameter.dtype == torch.bfloat16 for _, parameter in named):
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(
        model=SupervisedLM(model), optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def sharded_or_bf16(named: Sequence[tuple[str, nn.Parameter]], settings: Train) -> bool:
    """Whether DeepSpeed's own optimizer wrapper clips, and keeps the norm; at stage 0 in fp32 it clips and throws it away."""
    return settings.zero_stage > 0 or any(parameter.dtype == torch.bfloat16 for _, parameter in named)


def optimizer_step(
    engine: Any, batches: Sequence[Batch], supervised: int, max_grad_norm: float, device: torch.device
) -> tuple[float, float]:
    """Forward and backward over the micro-batches, one update; the loss of the whole global batch, and its gradient's norm.

    DeepSpeed averages gradients over ranks, so each rank's share is scaled by their number to make the average a sum.
    """
    world_size = dist.get_world_size()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        loss = engine(batch.to(device)) * (world_size / supervised)
        engine.backward(loss, scale_wrt_gas=False)
        total += loss.detach() / world_size
    norm: Any = None
    if not engine.gradient_clipping():
        parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    if norm is None:
        raise CellFailed("DeepSpeed reports no gradient norm: a diverging run could not be told from a good one.")
    if world_size > 1:
        dist.all_reduce(total)
    return float(total), float(norm)


def agree(flag: bool, device: torch.device) -> bool:
    """Whether any rank says so: ranks must stop and save together."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)
