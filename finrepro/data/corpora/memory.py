"""Token streams of texts that are small enough to be tokenized each time: the same windows as
from shards, without a folder.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from finrepro.data.corpora.stream import Tokens


class TextStream:
    """Documents, each with its start token first, as one array. As `stream.TokenStream`, but for
    `bytes`, which nobody asks for here.
    """

    def __init__(self, documents: Iterable[Sequence[int]]) -> None:
        parts = [np.asarray(ids, np.uint32) for ids in documents]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._tokens = np.concatenate([np.empty(0, np.uint32), *parts])
        self._starts = np.concatenate([np.zeros(min(1, len(parts)), np.int64), ends[:-1]])
        self.documents = len(parts)

    def __len__(self) -> int:
        """Tokens, start tokens included."""
        return len(self._tokens)

    def tokens(self, begin: int, end: int) -> Tokens:
        """Ids at positions [begin, end)."""
        return self._tokens[begin:end]

    def starts(self, begin: int, end: int) -> NDArray[np.int64]:
        """Positions in [begin, end) at which a document begins."""
        first, last = np.searchsorted(self._starts, (begin, end))
        return self._starts[first:last]
