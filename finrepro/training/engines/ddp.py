"""DistributedDataParallel and a plain optimizer: fp32, the engine that others are held against."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finrepro.catalogue.spec import Train
from finrepro.data.batches import Batch
from finrepro.errors import UsageError
from finrepro.methods.layers.supervised import SupervisedLM, objective
from finrepro.runtime import ranks
from finrepro.training.engines.base import Named


class PlainDDP:
    """torch's DistributedDataParallel; it does not import DeepSpeed.

    Raises `UsageError` for bfloat16 weights that are trained: nobody here keeps the float32 copy
    that small updates need.
    """

    def __init__(
        self, lm: SupervisedLM, named: Named, optimizer: Any, settings: Train, device: torch.device
    ) -> None:
        if any(parameter.dtype != torch.float32 for _, parameter in named):
            raise UsageError(
                "engine 'ddp' trains float32 parameters only: use an adapter, dtype float32, or "
                "engine 'deepspeed'."
            )
        self.named, self.optimizer, self.device = named, optimizer, device
        self.stepped_by = optimizer
        self.max_grad_norm, self.extra = settings.max_grad_norm, lm.extra_loss is not None
        self.module = nn.parallel.DistributedDataParallel(
            lm,
            device_ids=[device] if device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # noqa: D102
        return list(self.optimizer.param_groups)

    def backward(self, batch: Batch, scale: float, last: bool) -> Tensor:  # noqa: D102
        with nullcontext() if last else self.module.no_sync():
            aim, loss = objective(self.module, batch, scale, self.extra and last)
            aim.backward()
        return loss

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:  # noqa: D102
        return parameter.grad

    def update(self) -> Tensor | float:  # noqa: D102
        norm = nn.utils.clip_grad_norm_(
            [parameter for _, parameter in self.named], self.max_grad_norm
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:  # noqa: D102
        if ranks.current().is_main:
            (folder / tag).mkdir(parents=True, exist_ok=True)
            weights = {name: parameter.detach() for name, parameter in self.named}
            content = {"weights": weights, "optimizer": self.optimizer.state_dict(), "state": state}
            torch.save(content, folder / tag / "ddp.pt")

    def load(self, folder: Path, tag: str) -> dict[str, Any]:  # noqa: D102
        content = torch.load(folder / tag / "ddp.pt", map_location=self.device, weights_only=True)
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(content["weights"][name])
        self.optimizer.load_state_dict(content["optimizer"])
        return dict(content["state"])

    def close(self) -> None:  # noqa: D102
        self.optimizer.zero_grad()
        del self.module
