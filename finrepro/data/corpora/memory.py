"""Token streams in memory, for texts small enough to be tokenized in each run: the same windows as
from shards, without a folder.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from finrepro.data.corpora.stream import Tokens


class TextStream:
    """Documents, each with its start token first, as one array; otherwise as `TokenStream`,
    without its count of `bytes`.
    """

    def __init__(self, documents: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(ids, np.uint32) for ids in documents]
        ends = np.cumsum([len(ids) for ids in arrays], dtype=np.int64)
        self._tokens = np.concatenate([np.empty(0, np.uint32), *arrays])
        self._starts = np.concatenate([np.zeros(min(1, len(arrays)), np.int64), ends[:-1]])
        self.documents = len(arrays)

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
