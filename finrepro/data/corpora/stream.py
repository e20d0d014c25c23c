"""A split's tokens as one long array, memory-mapped from its shards: the cost of reading depends on
the number of tokens read, not on their position.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finrepro.data.corpora.index import (
    Index,
    Shard,
    Split,
    Unfinished,
    check_fits,
    index_digest,
    read_index,
    split_of,
)
from finrepro.errors import EnvironmentFault

Tokens = NDArray[np.unsignedinteger]


class TokenStream:
    """`stream.tokens(a, b)`: the ids at positions [a, b). `stream.starts(a, b)`: the positions
    among them at which a document begins.
    """

    finished = True

    def __init__(self, folder: Path, index: Index, split: Split) -> None:
        """Map every shard, without reading it. Raises `EnvironmentFault` for a file that is
        absent or of another length.
        """
        self._begin(folder, index.dtype, index.shard_tokens)
        self._complete(split)

    def _begin(self, folder: Path, dtype: str, capacity: int) -> None:
        self.folder, self.capacity, self.dtype = folder, capacity, np.dtype(dtype).newbyteorder("<")
        self.shards: list[Shard] = []
        self._tokens: list[Tokens] = []
        self._starts: list[Tokens] = []

    def _add(self, shard: Shard) -> None:
        """Map one more shard."""
        self._tokens.append(_map(self.folder / f"{shard.name}.tokens", self.dtype, shard.tokens))
        self._starts.append(
            _map(self.folder / f"{shard.name}.starts", np.dtype("<u4"), shard.documents)
        )
        self.shards.append(shard)

    def _complete(self, split: Split) -> None:
        """Map the last shards, those that are not mapped yet, and check the counts."""
        folder = self.folder
        for shard in split.shards[len(self.shards) :]:
            self._add(shard)
        self.documents, self.bytes, self._length = split.documents, split.bytes, split.tokens
        if any(len(tokens) != self.capacity for tokens in self._tokens[:-1]):
            raise EnvironmentFault(
                f"{folder}: a shard before the last one is not full; prepare the corpus again."
            )
        if (
            sum(map(len, self._tokens)) != self._length
            or sum(map(len, self._starts)) != self.documents
        ):
            raise EnvironmentFault(
                f"{folder}: the shards do not add up to the index's counts; "
                "prepare the corpus again."
            )

    @property
    def available(self) -> int:
        """The number of tokens that are there so far."""
        return self._length

    def __len__(self) -> int:
        """Tokens, start tokens included."""
        return self._length

    def reaches(self, count: int) -> bool:
        """Whether the stream has `count` tokens. A growing one waits until that is known."""
        return count <= self._length

    def tokens(self, begin: int, end: int) -> Tokens:
        """Ids at positions [begin, end): a view where one shard holds them all."""
        views = [self._tokens[k][a:b] for k, a, b in self._cut(begin, end)]
        return views[0] if len(views) == 1 else np.concatenate([np.empty(0, self.dtype), *views])

    def starts(self, begin: int, end: int) -> NDArray[np.int64]:
        """Positions in [begin, end) at which a document begins; a binary search in the shard's
        list.
        """
        positions = []
        for k, a, b in self._cut(begin, end):
            # Numbers of another type would copy the list.
            first, last = self._starts[k].searchsorted(np.array((a, b), "<u4"))
            positions.append(self._starts[k][first:last].astype(np.int64) + k * self.capacity)
        if len(positions) == 1:
            return positions[0]
        return np.concatenate([np.empty(0, np.int64), *positions])

    def _cut(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """(shard, from, to) inside each shard that [begin, end) touches."""
        base = self.capacity
        shards = range(begin // base, -(-end // base))
        return [(k, max(begin - k * base, 0), min(end - k * base, base)) for k in shards]


def _map(path: Path, dtype: "np.dtype[np.unsignedinteger]", count: int) -> Tokens:
    """A memory map of a file of `count` numbers; an array for an empty file, which has no map."""
    try:
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise EnvironmentFault(
                f"{path} has {size} bytes, expected {count * dtype.itemsize}: it is damaged; "
                "prepare the corpus again."
            )
        # A plain array over the map: indexing a memmap makes an object of a Python class each time.
        return np.asarray(np.memmap(path, dtype, "r")) if count else np.empty(0, dtype)
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: {error.strerror}; it is part of the corpus: prepare it again."
        ) from None


class Corpus:
    """An opened corpus: its `index`, its `digest` (the identity in a result's record), and a stream
    for each split.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index, self.digest = folder, index, index_digest(folder)

    def facts(self) -> dict[str, Any]:
        """What a result records: the sha256 of the index, the text's source, and the numbers of
        documents and tokens.
        """
        train = self.index.splits["train"]
        return {
            "index": self.digest,
            "source": self.index.source,
            "documents": train.documents,
            "tokens": train.tokens,
        }

    def made_from(self) -> dict[str, Any]:
        """What decides every byte of the corpus, known before it is finished."""
        return {field.name: getattr(self.index, field.name) for field in fields(Unfinished)}

    def stream(self, split: str = "train") -> TokenStream:
        """The tokens of a split. Raises `UsageError` for an unknown split, `EnvironmentFault` for
        a missing or truncated shard.
        """
        return TokenStream(self.folder, self.index, split_of(self.folder, self.index, split))


def open_corpus(folder: Path, tokenizer: str | None = None, rows: int | None = None) -> Corpus:
    """Open a prepared corpus for a model with this tokenizer (`tokenizer_digest`)
    and so many embeddings.

    Checks the index alone: sizes are checked as a split is opened, every sha256 by `invoke data
    --verify`. Raises `EnvironmentFault` (absent, damaged, another format version) or `UsageError`
    (it does not fit the model).
    """
    index = read_index(folder)
    check_fits(folder, index, tokenizer, rows)
    return Corpus(folder, index)
