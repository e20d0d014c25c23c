"""Windows of running text as training examples: documents do not see one another, and every token
is learned exactly once.

Window i has as inputs the tokens [i L, (i + 1) L) of the stream, L = `max_seq_len` exactly (the
last one may be shorter), cut into pieces where documents begin. Position t predicts token t + 1,
also when that one stands in the next window: nothing is lost at a border and no token goes through
the model twice. A document's first token follows nothing and is predicted nowhere, so that a stream
of T tokens in D documents has T - D supervised ones, whatever L.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from finrepro.data.corpora.order import permute
from finrepro.data.corpora.rows import Rows
from finrepro.data.corpora.stream import Tokens
from finrepro.data.tokens import IGNORE
from finrepro.errors import UsageError


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of one document: `ids` go in; each predicts the next, the last one `successor`
    (None: the document ends here).
    """

    ids: Tokens
    successor: int | None

    @property
    def num_supervised(self) -> int:
        """Positions whose successor is learned."""
        return len(self.ids) - (self.successor is None)

    def targets(self) -> NDArray[np.int64]:
        """For each position the id to predict there, `IGNORE` where there is none."""
        found = np.empty(len(self.ids), np.int64)
        found[:-1] = self.ids[1:]
        found[-1] = IGNORE if self.successor is None else self.successor
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """`ids` (inputs), the id after them, and `cuts`: where in the window, its end included,
    another document begins (never 0).
    """

    ids: Tokens
    after: int
    cuts: tuple[int, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """One a document, in order; together they are the window."""
        ids, length = self.ids, len(self.ids)
        if not self.cuts:
            return (Piece(ids, self.after),)
        whole = [
            Piece(ids[begin:end], None)
            for begin, end in zip((0, *self.cuts[:-1]), self.cuts, strict=True)
        ]
        rest = self.cuts[-1]
        return tuple(whole) if rest == length else (*whole, Piece(ids[rest:], self.after))

    @property
    def piece_lengths(self) -> tuple[int, ...]:
        """How long each piece is, without making them."""
        ends = (
            self.cuts
            if self.cuts and self.cuts[-1] == len(self.ids)
            else (*self.cuts, len(self.ids))
        )
        return tuple(end - begin for begin, end in zip((0, *ends), ends, strict=False))

    def targets(self) -> NDArray[np.int64]:
        """The pieces' targets, one after the other."""
        found = np.empty(len(self.ids), np.int64)
        found[:-1] = self.ids[1:]
        found[-1] = self.after
        for cut in self.cuts:
            found[cut - 1] = IGNORE
        return found

    @property
    def num_supervised(self) -> int:
        """Positions whose successor is learned: all but the last one of each document that ends
        here.
        """
        return len(self.ids) - len(self.cuts)


def check_length(max_seq_len: int) -> None:
    """Raise `UsageError` for windows of a token."""
    if max_seq_len < 2:
        raise UsageError(f"max_seq_len {max_seq_len}: windows of running text need at least 2.")


@dataclass(frozen=True, slots=True)
class Lengths(Rows[int]):
    """The lengths of all windows, without storing them: `number` of them, all `size` but the
    last.
    """

    number: int
    size: int
    last: int

    def __len__(self) -> int:
        return self.number

    def at(self, row: int) -> int:
        """The length of a window."""
        return self.last if row == self.number - 1 else self.size


@runtime_checkable
class Stream(Protocol):
    """A split's tokens, document after document."""

    documents: int

    def __len__(self) -> int: ...
    def tokens(self, begin: int, end: int) -> Tokens:
        """Ids at positions [begin, end)."""

    def starts(self, begin: int, end: int) -> NDArray[np.int64]:
        """Positions in [begin, end) at which a document begins."""


class Windows(Rows[Window]):
    """A split's windows, each read when it is asked for, and the order in which training takes
    them.

    Raises `UsageError` for a `max_seq_len` below 2 or a split without two tokens.
    """

    def __init__(self, stream: Stream, max_seq_len: int) -> None:
        check_length(max_seq_len)
        self.stream, self.max_seq_len = stream, max_seq_len
        # The stream's very last token predicts nothing: it is a target only. So no window is
        # without a supervised position.
        inputs = len(stream) - 1
        if inputs < 1:
            raise UsageError("the split holds no text to learn from.")
        count = -(-inputs // max_seq_len)
        self.lengths: Rows[int] = Lengths(count, max_seq_len, inputs - (count - 1) * max_seq_len)

    @property
    def num_supervised(self) -> int:
        """Over all windows: tokens minus documents."""
        return len(self.stream) - self.stream.documents

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, row: int) -> Window:
        """A window; O(1) in the length of the stream, but for a binary search."""
        length, begin = self.lengths.at(row), row * self.max_seq_len
        read = self.stream.tokens(begin, begin + length + 1)
        cuts = self.stream.starts(begin + 1, begin + length + 1) - begin
        return Window(read[:-1], int(read[-1]), tuple(cuts.tolist()))

    def order(self, positions: NDArray[np.int64], seed: int, part: int = 0) -> NDArray[np.int64]:
        """The windows at these positions of training's endless order: every epoch is a
        permutation of its own.
        """
        epochs, places = np.divmod(positions, len(self))
        found = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = permute(places[here], len(self), (seed, part, epoch))
        return found

    def rows(self, step: int, global_batch_size: int, seed: int) -> list[int]:
        """The windows of optimizer step `step`, from nothing but its number: no state, whatever
        the ranks or the workers.
        """
        first = step * global_batch_size
        return [int(row) for row in self.order(np.arange(first, first + global_batch_size), seed)]
