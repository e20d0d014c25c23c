"""DeepSpeed's engines, ZeRO stages 0 to 3."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finrepro.catalogue.reader import deepspeed_config
from finrepro.catalogue.spec import Train
from finrepro.data.batches import Batch
from finrepro.errors import CellFailed
from finrepro.methods.layers.supervised import SupervisedLM, backbone_and_head, objective
from finrepro.runtime import ranks
from finrepro.runtime.zero3 import gather_with_their_layer, keep_whole
from finrepro.training.engines.base import Named


class DeepSpeed:
    """DeepSpeed at the ZeRO stage of the settings."""

    def __init__(
        self, lm: SupervisedLM, named: Named, optimizer: Any, settings: Train, device: torch.device
    ) -> None:
        bf16 = any(parameter.dtype == torch.bfloat16 for _, parameter in named)
        # At stage 0 in float32 DeepSpeed clips and throws the norm away: we do it there, its
        # optimizer wrappers elsewhere.
        self.clips, self.extra = settings.zero_stage > 0 or bf16, lm.extra_loss is not None
        self.named, self.max_grad_norm, self.device = named, settings.max_grad_norm, device
        clipping = settings.max_grad_norm if self.clips else 0.0
        config = {"bf16": {"enabled": bf16}, "gradient_clipping": clipping}
        self.engine = _initialize(lm, optimizer, settings, device, config)
        self.stepped_by = self.engine.optimizer
        if hasattr(
            self.stepped_by, "fp32_groups"
        ):  # bfloat16 at stage 0 begins with a step of zero gradients
            optimizer.state.clear()
            self.stepped_by.refresh_fp32_params()
        keep_whole([parameter for _, parameter in named] if self.extra else [], lm)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # noqa: D102
        return list(self.engine.optimizer.param_groups)

    def backward(self, batch: Batch, scale: float, last: bool) -> Tensor:  # noqa: D102
        self.engine.set_gradient_accumulation_boundary(last)
        aim, loss = objective(self.engine, batch, scale, self.extra and last)
        self.engine.backward(aim, scale_wrt_gas=False)
        return loss

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:  # noqa: D102
        from deepspeed.utils import safe_get_full_grad

        gradient: Tensor | None = safe_get_full_grad(parameter)
        return gradient

    def update(self) -> Tensor | float:
        """Raises `CellFailed` when there is no norm."""
        norm = None
        if not self.clips:
            norm = nn.utils.clip_grad_norm_(
                [parameter for _, parameter in self.named], self.max_grad_norm
            )
        self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        if norm is None:
            raise CellFailed(
                "DeepSpeed reports no gradient norm: a diverging run could not be told from a good "
                "one."
            )
        return norm

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:  # noqa: D102
        self.engine.save_checkpoint(
            str(folder),
            tag=tag,
            client_state=state,
            save_latest=False,
            exclude_frozen_parameters=True,
        )

    def load(self, folder: Path, tag: str) -> dict[str, Any]:  # noqa: D102
        _, state = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        return dict(state)

    def close(self) -> None:  # noqa: D102
        self.engine.destroy()


def _initialize(
    module: nn.Module, optimizer: Any, settings: Train, device: torch.device, more: dict[str, Any]
) -> Any:
    """A DeepSpeed engine; without an optimizer one that only computes."""
    deepspeed = ranks.start_deepspeed(device)
    config = deepspeed_config(settings.zero_stage) | {
        "train_micro_batch_size_per_gpu": 1,
        # boundaries are set by hand: steps differ in their number of micro-batches
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config | more, dist_init_required=False
    )
    gather_with_their_layer(module)
    return engine


def is_sharded(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of which this rank holds a part (ZeRO-3)."""
    return [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]


@contextmanager
def inference(model: nn.Module, settings: Train, device: torch.device) -> Iterator[None]:
    """Inside, the model can be called, also where its parameters are sharded over the ranks
    (ZeRO-3).

    Then every layer's parameters are gathered for its own computation and dropped after it, so
    that no rank ever holds the whole model, and all ranks have to make the same calls.
    """
    if not is_sharded(model) and not (settings.zero_stage == 3 and ranks.current().world_size > 1):
        yield
        return
    zero = deepspeed_config(3)["zero_optimization"] | {
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    }
    engine = _initialize(model, None, settings, device, {"zero_optimization": zero})
    backbone, _ = backbone_and_head(model)
    # DeepSpeed counts passes through the whole model, and we call the backbone and the head by
    # themselves.
    started = backbone.register_forward_pre_hook(
        lambda *_: engine.optimizer.get_param_coordinator().reset_step()
    )
    try:
        yield
        engine.optimizer.partition_all_parameters()
    finally:
        started.remove()
        engine.destroy()


def make_whole(model: nn.Module) -> None:
    """Gather every parameter on every rank, and remove what ZeRO has attached to it."""
    for parameter in is_sharded(model):
        parameter.data = _gathered(parameter, parameter.device)
        for name in [name for name in vars(parameter) if name.startswith("ds_")]:
            delattr(parameter, name)


def collect_trained(model: nn.Module) -> None:
    """Gather the trained parameters in rank 0's host memory, one at a time, for it to export; all
    ranks call it.

    Nothing to do where they are not sharded. The model cannot be computed with afterwards.
    """
    host = torch.device("cpu") if ranks.current().is_main else None
    for parameter in is_sharded(model):
        if parameter.requires_grad and (data := _gathered(parameter, host)) is not None:
            parameter.data = data


def _gathered(parameter: nn.Parameter, device: torch.device | None) -> Any:
    """A copy of the whole parameter on `device`, None where that is None; every rank calls it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return None if device is None else parameter.detach().to(device, copy=True)
