"""Token shards on disk: a shard is whole or absent, and the same documents give the same bytes
however often the writing was cut short.

A shard's two files are written under hidden names, flushed to disk and renamed; then its record, in
`.preparing/`, says that it is whole. What no record names does not count. A writer that begins
again is given the same documents from the first one on: those in whole shards it passes over.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from finrepro.data.corpora.index import Shard, Split, write_record
from finrepro.data.corpora.stream import Tokens
from finrepro.errors import EnvironmentFault
from finrepro.evidence.files import flush
from finrepro.settings import build, plain

PREPARING = ".preparing"


class SplitWriter:
    """Writes one split's documents, in order, into shards of `capacity` tokens.

    Raises `EnvironmentFault` when the documents are not those that the whole shards were made from,
    or the disk is full.
    """

    def __init__(self, folder: Path, name: str, dtype: str, capacity: int) -> None:
        if not 2 <= capacity < 2**32:  # a start is a position in the shard, in 32 bits
            raise ValueError(f"a shard of {capacity} tokens")
        self.folder, self.name, self.capacity = folder, name, capacity
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shards, self._seals = _whole_shards(folder, name, capacity, self.dtype.itemsize)
        self._written = capacity * len(self.shards)
        begun = sum(shard.documents for shard in self.shards)
        # Documents that lie in whole shards entirely: the last one that begins there may not.
        self.documents_on_disk = max(0, begun - 1)
        self._position = _last_start(folder, self.shards, capacity)
        self.documents = self.bytes = 0
        self._chain = hashlib.sha256()
        self._open: BinaryIO | None = None
        self._starts: list[int] = []
        self._filled = 0
        self._digest = hashlib.sha256()

    def add(self, identity: bytes, size: int, ids: Tokens | None) -> None:
        """Add the next document: its identity, its text's size in bytes, and its ids, the start
        token first; None for one of the first `documents_on_disk`, which are not written again.
        """
        self.documents += 1
        self.bytes += size
        self._chain.update(identity)
        sealed = self._seals.get(self.documents)
        if sealed is not None and sealed != self._chain.hexdigest():
            self._changed()
        if self.documents <= self.documents_on_disk:
            return
        assert ids is not None
        if self._position >= self._written:
            self._starts.append(self._filled)
        rest = ids[max(0, min(len(ids), self._written - self._position)) :].astype(
            self.dtype, copy=False
        )
        self._position += len(ids)
        while len(rest):
            part, rest = rest[: self.capacity - self._filled], rest[self.capacity - self._filled :]
            self._append(part)
            if self._filled == self.capacity:
                self._close_shard()

    def finish(self) -> Split:
        """Write the last shard, which need not be full, and return what the index says of the
        split.
        """
        if self.documents < max(self._seals, default=0):
            self._changed()
        if self._filled:
            self._close_shard()
        return Split(
            documents=self.documents,
            tokens=self._position,
            bytes=self.bytes,
            shards=tuple(self.shards),
        )

    def close(self) -> None:
        """Leave off: what is not a whole shard is taken away."""
        if self._open is not None:
            with contextlib.suppress(
                OSError
            ):  # what it still holds back may not fit on the disk either
                self._open.close()
            self._open = None
            for kind in ("tokens", "starts"):
                self._hidden(kind).unlink(missing_ok=True)

    def _changed(self) -> None:
        raise EnvironmentFault(
            f"{self.folder}: the sources are not what they were when this preparation was begun; "
            "bring them back, or prepare into another folder."
        )

    def _file(self, kind: str) -> Path:
        return self.folder / f"{self.name}-{len(self.shards):05d}.{kind}"

    def _hidden(self, kind: str) -> Path:
        return self._file(kind).with_name(f".{self._file(kind).name}.partial")

    def _append(self, part: Tokens) -> None:
        if self._open is None:
            self._open = self._hidden("tokens").open("wb")
            self._digest = hashlib.sha256()
        content = part.tobytes()
        self._open.write(content)
        self._digest.update(content)
        self._filled += len(part)

    def _close_shard(self) -> None:
        assert self._open is not None
        flush(self._open)
        self._open.close()
        self._open = None
        starts = np.array(self._starts, "<u4").tobytes()
        with self._hidden("starts").open("wb") as file:
            file.write(starts)
            flush(file)
        for kind in ("tokens", "starts"):
            self._hidden(kind).replace(self._file(kind))
        shard = Shard(
            name=f"{self.name}-{len(self.shards):05d}",
            tokens=self._filled,
            documents=len(self._starts),
            sha256_tokens=self._digest.hexdigest(),
            sha256_starts=hashlib.sha256(starts).hexdigest(),
        )
        record = {"shard": plain(shard), "begun": self.documents, "seal": self._chain.hexdigest()}
        write_record(self.folder / PREPARING / f"{shard.name}.json", record)
        self.shards.append(shard)
        self._starts, self._filled = [], 0


def _whole_shards(
    folder: Path, name: str, capacity: int, id_bytes: int
) -> tuple[list[Shard], dict[int, str]]:
    """The full shards that an earlier attempt has left, and by number of documents the seal over
    their texts.
    """
    shards: list[Shard] = []
    seals: dict[int, str] = {}
    while found := whole_shard(folder, f"{name}-{len(shards):05d}", capacity, id_bytes):
        shards.append(found[0])
        seals[found[1]["begun"]] = found[1]["seal"]
    return shards, seals


def whole_shard(
    folder: Path, name: str, capacity: int, id_bytes: int
) -> tuple[Shard, dict[str, Any]] | None:
    """A full shard of a preparation that has not ended, with its record; None if it is not there,
    not full or not whole.

    The last one is written again: whether it is the last is not known yet. So is one that somebody
    took away, with those after it.
    """
    path = folder / PREPARING / f"{name}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    shard = build(Shard, record["shard"], str(path))
    there = [_size(folder / f"{shard.name}.{kind}") for kind in ("tokens", "starts")]
    whole = shard.tokens == capacity and there == [capacity * id_bytes, shard.documents * 4]
    return (shard, record) if whole else None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _last_start(folder: Path, shards: list[Shard], capacity: int) -> int:
    """Where in the stream the last document begins that begins in these shards; 0 without any."""
    for number in reversed(range(len(shards))):
        if shards[number].documents:
            starts = np.fromfile(folder / f"{shards[number].name}.starts", "<u4")
            return number * capacity + int(starts[-1])
    return 0
