"""Micro-batches as tensors: padded examples side by side, or concatenated ones in a bin."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from finrepro.data.corpora.windows import Window
from finrepro.data.tokens import IGNORE, Encoded
from finrepro.errors import UsageError

Sample = Encoded | Window
TokenMatrix = NDArray[np.int64] | list[list[int]]


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass. `positions` are the supervised positions in the flattened
    batch, `targets` the ids to predict there.

    Padding is on the right, where causal attention does not see it, so there is no mask. In a bin
    `segment_lengths` are the pieces' lengths: attention stays inside each
    (finrepro.methods.layers.isolated_attention), and `position_ids` start at 0 in each.
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
    input_ids: TokenMatrix,
    targets: TokenMatrix,
    position_ids: Tensor,
    segments: tuple[int, ...] | None,
) -> Batch:
    flat = np.asarray(targets, np.int64).reshape(-1)
    supervised = np.flatnonzero(flat != IGNORE)  # NumPy takes a fifth of torch's time for these two
    return Batch(
        torch.as_tensor(input_ids),
        position_ids,
        torch.from_numpy(supervised),
        torch.from_numpy(flat[supervised]),
        segments,
    )


def side_by_side(examples: Sequence[Sample], pad_id: int = 0) -> Batch:
    """Rows of equal length, padded on the right with `pad_id`, whose value has no effect.

    Raises `UsageError` for a window of several documents: in one row they would see one another.
    """
    if any(len(example.pieces) > 1 for example in examples):
        raise UsageError(
            "windows of running text hold several documents: "
            "they need the layout 'bins', not 'padded'."
        )
    pieces = [example.pieces[0] for example in examples]
    longest = max(len(piece.ids) for piece in pieces)
    rows = np.full((len(pieces), longest), pad_id, np.int64)
    targets = np.full((len(pieces), longest), IGNORE, np.int64)
    for row, piece in enumerate(pieces):
        rows[row, : len(piece.ids)] = piece.ids
        targets[row, : len(piece.ids)] = piece.targets()
    return _finish(rows, targets, torch.arange(longest)[None], None)


def end_to_end(examples: Sequence[Sample]) -> Batch:
    """One row: the examples' pieces, concatenated."""
    ids = np.concatenate([example.ids for example in examples], dtype=np.int64)
    targets = np.concatenate([example.targets() for example in examples])
    lengths = tuple(length for example in examples for length in example.piece_lengths)
    begins = np.cumsum((0, *lengths[:-1]))
    positions = torch.from_numpy(np.arange(len(ids)) - np.repeat(begins, lengths))[None]
    return _finish(ids[None], targets[None], positions, lengths)


def empty() -> Batch:
    """A batch without a supervised position, for a rank without examples, which still has to join
    the collective calls.
    """
    return side_by_side([Encoded((0, 0), 2)])


COLLATE = {"padded": side_by_side, "bins": end_to_end}
