"""Windows of running text as training examples: documents do not see one another, and every token
is learned exactly once.

Window i has as inputs the tokens [i L, (i + 1) L) of the stream, L = `max_seq_len` exactly (the
last one may be shorter), cut into pieces where documents begin. Position t predicts token t + 1,
also when that one stands in the next window: no prediction is lost at a border, and no token goes
through the model twice. A document's first token is predicted nowhere, so that a stream of T tokens
in D documents has T - D supervised ones, whatever L.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from finrepro.data.corpora.lazy_sequence import LazySequence
from finrepro.data.corpora.order import permute
from finrepro.data.corpora.stream import Tokens
from finrepro.data.tokens import IGNORE
from finrepro.errors import UsageError


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of one document: input `ids`, each of which predicts the next; the last one predicts
    `successor` (None: the document ends here).
    """

    ids: Tokens
    successor: int | None

    @property
    def num_supervised(self) -> int:
        """Positions whose successor is learned."""
        return len(self.ids) - (self.successor is None)

    def targets(self) -> NDArray[np.int64]:
        """For each position the id to predict there, `IGNORE` where there is none."""
        targets = np.empty(len(self.ids), np.int64)
        targets[:-1] = self.ids[1:]
        targets[-1] = IGNORE if self.successor is None else self.successor
        return targets


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Input `ids`, the id `after` them, and `cuts`: the positions in the window, from 1 to its
    length, at which another document begins.
    """

    ids: Tokens
    after: int
    cuts: tuple[int, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The window cut into one piece a document, in order."""
        ids, length = self.ids, len(self.ids)
        if not self.cuts:
            return (Piece(ids, self.after),)
        ended = tuple(
            Piece(ids[begin:end], None)
            for begin, end in zip((0, *self.cuts[:-1]), self.cuts, strict=True)
        )
        last = self.cuts[-1]
        return ended if last == length else (*ended, Piece(ids[last:], self.after))

    @property
    def piece_lengths(self) -> tuple[int, ...]:
        """The length of each piece, without making them."""
        ends = (
            self.cuts
            if self.cuts and self.cuts[-1] == len(self.ids)
            else (*self.cuts, len(self.ids))
        )
        return tuple(end - begin for begin, end in zip((0, *ends), ends, strict=False))

    def targets(self) -> NDArray[np.int64]:
        """The pieces' targets, one after the other."""
        targets = np.empty(len(self.ids), np.int64)
        targets[:-1] = self.ids[1:]
        targets[-1] = self.after
        for cut in self.cuts:
            targets[cut - 1] = IGNORE
        return targets

    @property
    def num_supervised(self) -> int:
        """Positions whose successor is learned: all but the last one of each document that ends
        here.
        """
        return len(self.ids) - len(self.cuts)


def check_length(max_seq_len: int) -> None:
    """Raise `UsageError` for windows of less than two tokens."""
    if max_seq_len < 2:
        raise UsageError(f"max_seq_len {max_seq_len}: windows of running text need at least 2.")


@dataclass(frozen=True, slots=True)
class Lengths(LazySequence[int]):
    """The lengths of all windows, without storing them: `number` of them, all `size` but the
    last.
    """

    number: int
    size: int
    last: int

    def __len__(self) -> int:
        return self.number

    def at(self, index: int) -> int:
        """The length of a window."""
        return self.last if index == self.number - 1 else self.size


@runtime_checkable
class Stream(Protocol):
    """A split's tokens, document after document."""

    documents: int

    def __len__(self) -> int: ...
    def tokens(self, begin: int, end: int) -> Tokens:
        """Ids at positions [begin, end)."""

    def starts(self, begin: int, end: int) -> NDArray[np.int64]:
        """Positions in [begin, end) at which a document begins."""


class Windows(LazySequence[Window]):
    """A split's windows, each read on access, and the order in which training takes them.

    Raises `UsageError` for a `max_seq_len` below 2 or a split without two tokens.
    """

    def __init__(self, stream: Stream, max_seq_len: int) -> None:
        check_length(max_seq_len)
        self.stream, self.max_seq_len = stream, max_seq_len
        # The stream's very last token is a target only: so every window has a supervised position.
        inputs = len(stream) - 1
        if inputs < 1:
            raise UsageError("the split holds no text to learn from.")
        count = -(-inputs // max_seq_len)
        self.lengths: LazySequence[int] = Lengths(
            count, max_seq_len, inputs - (count - 1) * max_seq_len
        )

    @property
    def num_supervised(self) -> int:
        """Over all windows: tokens minus documents."""
        return len(self.stream) - self.stream.documents

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, index: int) -> Window:
        """A window; O(1) in the length of the stream, but for a binary search."""
        length, begin = self.lengths.at(index), index * self.max_seq_len
        read = self.stream.tokens(begin, begin + length + 1)
        cuts = self.stream.starts(begin + 1, begin + length + 1) - begin
        return Window(read[:-1], int(read[-1]), tuple(cuts.tolist()))

    def order(self, positions: NDArray[np.int64], seed: int, stream: int = 0) -> NDArray[np.int64]:
        """The windows at these positions of training's endless order: every epoch is a
        permutation of its own, keyed by (seed, number of the stream in a mixture, epoch).
        """
        epochs, offsets = np.divmod(positions, len(self))
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            indices[in_epoch] = permute(offsets[in_epoch], len(self), (seed, stream, epoch))
        return indices

    def rows(self, step: int, global_batch_size: int, seed: int) -> list[int]:
        """The windows of optimizer step `step`, from its number alone: there is no state, and
        neither ranks nor workers change it.
        """
        first = step * global_batch_size
        return [int(row) for row in self.order(np.arange(first, first + global_batch_size), seed)]
