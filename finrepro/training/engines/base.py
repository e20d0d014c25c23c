"""What the loop asks of an engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from finrepro.data.batches import Batch

Named = Sequence[tuple[str, nn.Parameter]]


@runtime_checkable
class Engine(Protocol):
    """The part of a training engine that the loop and the checkpoints know."""

    stepped_by: Any  # the optimizer as the engine has it: torch's, or DeepSpeed's around it

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, whose `lr` the loop sets; each has its `lr_scale`."""

    def backward(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """Add the gradient of a micro-batch's loss times `scale`; the scaled loss. Ranks
        exchange gradients at the last one, where that of the adapter's extra loss is added once,
        which is no part of what is returned."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """A trained parameter's whole gradient, after the last `backward` and before `update`;
        all ranks call it.
        """

    def update(self) -> Tensor | float:
        """Clip, take one optimizer step, forget the gradients; the gradient's norm before
        clipping.
        """

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Write trained weights, optimizer and `state` to `folder/tag`; all ranks call it."""

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Take up what `save` wrote; its `state`."""

    def close(self) -> None:
        """Let go of the model, which keeps what was learned; at ZeRO stage 3 it stays sharded."""
