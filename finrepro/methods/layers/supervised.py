"""A causal language model that sends only the supervised positions through its output head.

With a vocabulary of 128,256 the head is the largest activation of fine-tuning: for a prompt of 60
tokens and an answer of two, 97 % of its rows would be computed only to be ignored.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from finrepro.data.batches import Batch

ExtraLoss = Callable[[nn.Module], Float[Tensor, ""]]


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The transformer below the output head, and the head, also of a model that PEFT has
    wrapped.
    """
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    return getattr(inner, inner.base_model_prefix), inner.get_output_embeddings()


def hidden_states(model: nn.Module, batch: Batch, **kwargs: Any) -> Float[Tensor, "tokens d_model"]:
    """Last hidden states of every position, flattened."""
    backbone, _ = backbone_and_head(model)
    lengths = batch.segment_lengths
    # A tensor: compiled code would take each tuple of numbers for another program.
    segments = {} if lengths is None else {"segment_lengths": torch.tensor(lengths)}
    output = backbone(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **segments,
        **kwargs,
    )
    return output.last_hidden_state.flatten(0, 1)


def log_likelihood(
    head: nn.Module, hidden: Float[Tensor, "positions d_model"], targets: Int[Tensor, " positions"]
) -> Float[Tensor, " positions"]:
    """Natural log-probability of each target, in float32."""
    return -cross_entropy(head(hidden).float(), targets, reduction="none")


class SupervisedLM(nn.Module):
    """Wraps a causal language model; `forward` gives the negative log-likelihood summed over the
    batch's supervised tokens.

    With `extra` also the value of `extra_loss`, computed inside `forward`, where ZeRO-3 gathers the
    parameters that it reads.
    """

    def __init__(self, model: nn.Module, extra_loss: ExtraLoss | None = None) -> None:
        super().__init__()
        self.model, self.extra_loss = model, extra_loss

    def forward(
        self, batch: Batch, extra: bool = False
    ) -> Float[Tensor, ""] | tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Sum, not mean: the caller divides by the supervised tokens of the global batch, which
        may span many forwards.
        """
        loss = self._loss(batch)
        return (loss, self.extra_loss(self.model).float()) if extra and self.extra_loss else loss

    def _loss(self, batch: Batch) -> Float[Tensor, ""]:
        hidden = hidden_states(self.model, batch)
        _, head = backbone_and_head(self.model)
        if len(batch.positions) == 0:  # keep the graph whole for collective backward passes
            return (head(hidden[:1]) * 0).sum().float()
        return -log_likelihood(head, hidden[batch.positions], batch.targets).sum()


def objective(module: Any, batch: Batch, scale: float, extra: bool) -> tuple[Tensor, Tensor]:
    """The scalar to differentiate, and the scaled loss. Every rank adds the same extra loss, so
    that the average over the ranks has it once.
    """
    if not extra:
        loss = module(batch) * scale
        return loss, loss.detach()
    loss, more = module(batch, extra=True)
    loss = loss * scale
    return loss + more, loss.detach()
