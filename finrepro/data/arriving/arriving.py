"""Windows in the order in which their text arrives, so that training can begin before the corpus is
finished.

In the first epoch windows are taken block by block: `block` consecutive windows of the stream,
permuted among themselves. Later epochs are permutations of all windows. The window at a position
follows from the seed and the stream alone: a finished corpus gives the same ones as a corpus that
is being written, however slowly.
"""

import numpy as np
from numpy.typing import NDArray

from finrepro.data.corpora.lazy_sequence import LazySequence
from finrepro.data.corpora.order import permute
from finrepro.data.corpora.stream import TokenStream
from finrepro.data.corpora.windows import Windows, check_length


class ArrivingLengths(LazySequence[int]):
    """The lengths of all windows. `len` counts those that are there so far, after waiting for the
    first: training may not depend on it before the stream has ended.
    """

    def __init__(self, stream: TokenStream, size: int) -> None:
        self._stream, self._size = stream, size

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        self._stream.reaches(self._size + 1)
        inputs = self._stream.available - 1
        return -(-inputs // self._size) if self._stream.finished else inputs // self._size

    def has(self, index: int) -> bool:
        """Whether there is a window at `index`: it needs a token, and the one after it."""
        return self._stream.reaches(index * self._size + 2)

    def at(self, index: int) -> int:
        """The length of a window; only the last one may be shorter."""
        is_full = self._stream.reaches((index + 1) * self._size + 1)
        return self._size if is_full else len(self._stream) - 1 - index * self._size


class ArrivingWindows(Windows):
    """As `Windows`, over a stream that may still grow, in blocks of `block` windows. Raises
    `UsageError` as `Windows`, once the stream has ended.
    """

    def __init__(self, stream: TokenStream, max_seq_len: int, block: int) -> None:
        check_length(max_seq_len)
        self.stream: TokenStream = stream
        self.max_seq_len, self.block = max_seq_len, block
        self.lengths = ArrivingLengths(stream, max_seq_len)

    def has(self, index: int) -> bool:
        """Whether there is a window at `index`."""
        return self.lengths.has(index)

    def order(self, positions: NDArray[np.int64], seed: int, stream: int = 0) -> NDArray[np.int64]:
        """The windows at these positions; waits for the blocks of those in the first epoch."""
        indices = np.empty_like(positions)
        later = np.zeros(len(positions), bool)
        blocks, offsets = np.divmod(positions, self.block)
        for block in np.unique(blocks).tolist():
            begin, in_block = block * self.block, blocks == block
            size = self.block
            # Where the stream has ended, its last block is a shorter one.
            if not self.stream.reaches((begin + size) * self.max_seq_len + 1):
                size = min(self.block, max(0, len(self) - begin))
                later |= in_block & (positions >= len(self))
                in_block &= positions < len(self)
            if in_block.any():
                key = (seed, stream, 0, block)
                indices[in_block] = begin + permute(offsets[in_block], size, key)
        if later.any():
            indices[later] = super().order(positions[later], seed, stream)
        return indices
