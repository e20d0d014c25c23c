"""Micro-batches as tensors: examples side by side with padding, or one after the other in a bin."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from finrepro.tokens import IGNORE, Encoded


@dataclass(frozen=True)
class Batch:
    """One forward pass. `positions` are the supervised positions in the flattened batch, `targets` the ids to predict there.

    Padding stands on the right, where causal attention cannot see it, so no mask is needed. In a bin, `segment_lengths` gives the
    examples' lengths: attention is confined to each (finrepro.layers.isolated_attention) and `position_ids` start again at 0.
    """

    input_ids: Int[Tensor, "batch seq"]
    position_ids: Int[Tensor, "#batch seq"]
    positions: Int[Tensor, " supervised"]
    targets: Int[Tensor, " supervised"]
    segment_lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.segment_lengths,
        )


def _finish(
    input_ids: list[list[int]], targets: list[list[int]], positions: Tensor, segments: tuple[int, ...] | None
) -> Batch:
    flat = torch.tensor(targets).flatten()
    supervised = (flat != IGNORE).nonzero().flatten()
    return Batch(torch.tensor(input_ids), positions, supervised, flat[supervised], segments)


def side_by_side(examples: Sequence[Encoded], pad_id: int = 0) -> Batch:
    """Rows of equal length, padded on the right with `pad_id`, whose value cannot matter."""
    longest = max(len(example.ids) for example in examples)
    rows = [[*example.ids, *[pad_id] * (longest - len(example.ids))] for example in examples]
    targets = [[*example.targets(), *[IGNORE] * (longest - len(example.ids))] for example in examples]
    return _finish(rows, targets, torch.arange(longest)[None], None)


def end_to_end(examples: Sequence[Encoded]) -> Batch:
    """One row that holds the examples one after the other."""
    ids = [token for example in examples for token in example.ids]
    targets = [target for example in examples for target in example.targets()]
    lengths = tuple(len(example.ids) for example in examples)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return _finish([ids], [targets], positions, lengths)


def empty() -> Batch:
    """A batch without a supervised position: a rank that has run out of examples still joins the collective calls."""
    return side_by_side([Encoded((0, 0), 2)])


COLLATE = {"padded": side_by_side, "bins": end_to_end}
