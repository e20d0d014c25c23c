"""Token shards on disk: a shard is complete or absent, and the same documents give the same bytes
however often the writing was interrupted.

A shard's two files are written under hidden names, flushed to disk and renamed; then its record is
written to `.preparing/`. Files without a record do not count. A writer that resumes gets the same
documents from the first one on, and skips those that complete shards hold.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from finrepro import bounds
from finrepro.data.corpora.index import Shard, Split, write_record
from finrepro.data.corpora.stream import Tokens
from finrepro.errors import EnvironmentFault
from finrepro.evidence.files import flush
from finrepro.settings import build, plain

PREPARING = ".preparing"


class SplitWriter:
    """Writes one split's documents, in order, into shards of `capacity` tokens.

    Raises `EnvironmentFault` when the documents differ from those that the complete shards were
    made from.
    """

    def __init__(self, folder: Path, name: str, dtype: str, capacity: int) -> None:
        if not 2 <= capacity < 2**32:  # a start is a position in the shard, in 32 bits
            raise ValueError(f"a shard of {capacity} tokens")
        self.folder, self.name, self.capacity = folder, name, capacity
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shards, self._seals = _complete_shards(folder, name, capacity, self.dtype.itemsize)
        self._written = capacity * len(self.shards)
        # Documents that complete shards hold to their ends: the last one may go on after them.
        self.documents_on_disk = max(0, sum(shard.documents for shard in self.shards) - 1)
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
            room = self.capacity - self._filled
            self._append(rest[:room])
            rest = rest[room:]
            if self._filled == self.capacity:
                self._close_shard()

    def finish(self) -> Split:
        """Write the last shard, which need not be full, and return the index's record of the
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
        """Stop, and remove the incomplete shard."""
        if self._open is not None:
            # Its buffer may not fit on a full disk.
            with contextlib.suppress(OSError):
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

    def _append(self, tokens: Tokens) -> None:
        if self._open is None:
            self._open = self._hidden("tokens").open("wb")
            self._digest = hashlib.sha256()
        content = tokens.tobytes()
        self._open.write(content)
        self._digest.update(content)
        self._filled += len(tokens)

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


def _complete_shards(
    folder: Path, name: str, capacity: int, id_bytes: int
) -> tuple[list[Shard], dict[int, str]]:
    """The full shards of an earlier attempt, and by number of documents the digest over their
    identities.
    """
    shards: list[Shard] = []
    seals: dict[int, str] = {}
    while complete := complete_shard(folder, f"{name}-{len(shards):05d}", capacity, id_bytes):
        shard, record = complete
        shards.append(shard)
        seals[record["begun"]] = record["seal"]
    return shards, seals


def complete_shard(
    folder: Path, name: str, capacity: int, id_bytes: int
) -> tuple[Shard, dict[str, Any]] | None:
    """A full shard of an unfinished preparation, with its record; None where it is absent, damaged
    or not full.

    A shard that is not full is written again, since more documents may follow; so is one that was
    deleted, with those after it.
    """
    path = folder / PREPARING / f"{name}.json"
    try:
        record = bounds.read_json(path)
    except FileNotFoundError:
        return None
    shard = build(Shard, record["shard"], str(path))
    sizes = [_size(folder / f"{shard.name}.{kind}") for kind in ("tokens", "starts")]
    is_complete = shard.tokens == capacity and sizes == [capacity * id_bytes, shard.documents * 4]
    return (shard, record) if is_complete else None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _last_start(folder: Path, shards: list[Shard], capacity: int) -> int:
    """The position in the stream at which these shards' last document begins; 0 without any."""
    for number in reversed(range(len(shards))):
        if shards[number].documents:
            starts = np.fromfile(folder / f"{shards[number].name}.starts", "<u4")
            return number * capacity + int(starts[-1])
    return 0
