"""Windows in the order in which their text arrives, so that training can begin before the corpus is
finished.

In the first epoch windows are taken block after block, a block being `block` windows that follow
one another in the stream, permuted among themselves; later epochs are permutations of all windows,
as ever. Which window a position has follows from the seed and the stream: a corpus that is finished
gives the same ones as one that is being written, however slowly.
"""

import numpy as np
from numpy.typing import NDArray

from finrepro.data.corpora.order import permute
from finrepro.data.corpora.rows import Rows
from finrepro.data.corpora.stream import TokenStream
from finrepro.data.corpora.windows import Windows, check_length


class ArrivingLengths(Rows[int]):
    """The lengths of all windows. `len` counts those that are there so far, of which it waits
    for the first: nothing that is learned may depend on it before the stream has ended."""

    def __init__(self, stream: TokenStream, size: int) -> None:
        self._stream, self._size = stream, size

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        self._stream.reaches(self._size + 1)
        inputs = self._stream.available - 1
        return -(-inputs // self._size) if self._stream.finished else inputs // self._size

    def has(self, row: int) -> bool:
        """Whether there is such a window: one has at least a token and the one after it."""
        return self._stream.reaches(row * self._size + 2)

    def at(self, row: int) -> int:
        """The length of a window; only the last one's is another."""
        whole = self._stream.reaches((row + 1) * self._size + 1)
        return self._size if whole else len(self._stream) - 1 - row * self._size


class ArrivingWindows(Windows):
    """As `Windows`, over a stream that may still grow. Raises `UsageError` as that, when the
    stream has ended.
    """

    def __init__(self, stream: TokenStream, max_seq_len: int, block: int) -> None:
        check_length(max_seq_len)
        self.stream: TokenStream = stream
        self.max_seq_len, self.block = max_seq_len, block
        self.lengths = ArrivingLengths(stream, max_seq_len)

    def has(self, row: int) -> bool:
        """Whether there is such a window."""
        return self.lengths.has(row)

    def order(self, positions: NDArray[np.int64], seed: int, part: int = 0) -> NDArray[np.int64]:
        """The windows at these positions; waits until the blocks of those in the first epoch are
        there.
        """
        found = np.empty_like(positions)
        later = np.zeros(len(positions), bool)
        blocks, places = np.divmod(positions, self.block)
        for block in np.unique(blocks).tolist():
            begin, here = block * self.block, blocks == block
            size = self.block
            # Where the stream has ended, its last block is a shorter one.
            if not self.stream.reaches((begin + size) * self.max_seq_len + 1):
                size = min(self.block, max(0, len(self) - begin))
                later |= here & (positions >= len(self))
                here &= positions < len(self)
            if here.any():
                found[here] = begin + permute(places[here], size, (seed, part, 0, block))
        if later.any():
            found[later] = super().order(positions[later], seed, part)
        return found
