"""A corpus that is read while it is being written: the same tokens at the same positions as in the
finished one, as soon as they are there.

The shards' records, and the index once there is one, say which shards are complete. A read beyond
them waits. So the tokens read depend on the text alone, not on when it arrived.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finrepro.data.corpora.folders import TOKENIZER
from finrepro.data.corpora.index import (
    Shard,
    Unfinished,
    check_fits,
    dtype_for,
    read_index,
    split_of,
)
from finrepro.data.corpora.stream import Corpus, Tokens, TokenStream, open_corpus
from finrepro.data.preparing import underway
from finrepro.data.preparing.verify import file_faults
from finrepro.data.preparing.writer import complete_shard
from finrepro.data.tokenizer_files import tokenizer_digest, version_of
from finrepro.errors import EnvironmentFault, Unavailable
from finrepro.runtime import ranks
from finrepro.settings import plain

PAUSE_SECONDS = 0.1
PATIENCE_SECONDS = 60.0  # without a preparing process: the next one has to start first

# Called with a message that says what is waited for. It may raise, in order to stop waiting, and
# returns whether a preparing process is about to start.
Waiting = Callable[[str], bool]


class Watch:
    """Waits for the process that prepares a folder; `seconds` is the total so far."""

    def __init__(self, folder: Path, waiting: Waiting = lambda _: False) -> None:
        self.folder, self.seconds, self._waiting = folder, 0.0, waiting
        self._idle: float | None = None

    def pause(self, message: str) -> None:
        """Wait a moment. Raises `EnvironmentFault` when no process has prepared the folder for a
        minute, with the reason that the last one left.
        """
        began = time.monotonic()
        if self._waiting(message) or underway.is_locked(self.folder):
            self._idle = None
        else:
            self._idle = self._idle if self._idle is not None else began
            # The first rank knows who is about to start, and ends the other ranks when it ends.
            expired = began - self._idle >= PATIENCE_SECONDS and ranks.current().is_main
            if expired and not underway.is_finished(self.folder):
                reason = (
                    underway.failure(self.folder)
                    or "it was killed, or never begun: invoke data --prepare goes on with it"
                )
                raise EnvironmentFault(f"{self.folder}: the preparation has stopped: {reason}")
        time.sleep(PAUSE_SECONDS)
        self.seconds += time.monotonic() - began


class GrowingStream(TokenStream):
    """A split of a corpus that may be unfinished. Its length and its number of documents are known
    at the end: reading them waits for it.
    """

    def __init__(self, folder: Path, unfinished: Unfinished, split: str, watch: Watch) -> None:
        capacity = int(unfinished.options["shard_tokens"])
        self._begin(folder, dtype_for(unfinished.vocabulary), capacity)
        self.unfinished, self.split, self.watch = unfinished, split, watch
        self.finished, self._length = False, 0
        self.read_end = 0  # the position after the last token that was read
        self.look()

    def look(self) -> None:
        """Map the shards that have been completed. Raises `EnvironmentFault` where the finished
        corpus is another than the one that was begun.
        """
        if self.finished:
            return
        if underway.is_finished(self.folder):
            self._finish()
            return
        id_bytes = self.dtype.itemsize
        while complete := complete_shard(
            self.folder, f"{self.split}-{len(self.shards):05d}", self.capacity, id_bytes
        ):
            self._add(complete[0])
            self._length += self.capacity

    def _add(self, shard: Shard) -> None:
        """Map one more shard, if its bytes are the recorded ones: a finished corpus is checked
        before it is trained on, this one as it comes.
        """
        if faults := file_faults(self.folder, shard):
            raise EnvironmentFault(f"{self.folder}: it is damaged: {faults[0]}")
        super()._add(shard)

    def _finish(self) -> None:
        index = read_index(self.folder)
        split = split_of(self.folder, index, self.split)
        same = all(getattr(index, key) == value for key, value in plain(self.unfinished).items())
        if not same or list(split.shards[: len(self.shards)]) != self.shards:
            raise EnvironmentFault(
                f"{self.folder}: the corpus was replaced by another one while it was read."
            )
        self._complete(split)
        self.finished = True

    def reaches(self, count: int) -> bool:
        """Whether the stream has `count` tokens; waits until that is known."""
        while self._length < count and not self.finished:
            self.look()
            if self._length >= count or self.finished:
                break
            try:
                self.watch.pause(
                    f"waiting for text: {self.folder.name}, shard {len(self.shards) + 1}"
                )
            except Unavailable:
                raise
            except EnvironmentFault as error:
                self.look()  # its last shard may have come just before
                if self._length >= count or self.finished:
                    break
                if self.shards:
                    raise
                # No step was trained on it: the cell is skipped.
                raise Unavailable(str(error)) from None
        return count <= self._length

    def tokens(self, begin: int, end: int) -> Tokens:
        """Ids at positions [begin, end), as soon as they are there."""
        self.reaches(end)
        self.read_end = max(self.read_end, min(end, self._length))
        return super().tokens(begin, end)

    def __len__(self) -> int:
        """Tokens, start tokens included; waits for the end."""
        self.reaches(sys.maxsize)
        return self._length


class GrowingCorpus:
    """A corpus that was unfinished when it was opened. As `stream.Corpus`, of the training split
    alone.
    """

    def __init__(self, folder: Path, unfinished: Unfinished, waiting: Waiting) -> None:
        self.folder, self.index = folder, unfinished
        self._stream = GrowingStream(folder, unfinished, "train", Watch(folder, waiting))

    def stream(self) -> GrowingStream:
        """The tokens of the training split."""
        return self._stream

    def made_from(self) -> dict[str, Any]:
        """What decides every byte of the corpus."""
        values: dict[str, Any] = plain(self.index)
        return values

    def facts(self, tokens: int | None = None) -> dict[str, Any]:
        """What a result records: as of a finished corpus if it is one by now, else what it is made
        from and the sha256 of the shards that hold the first `tokens` tokens; None: those that
        this process has read.
        """
        stream = self._stream
        stream.look()
        progress = {"finished": stream.finished, "waited_seconds": round(stream.watch.seconds, 1)}
        if stream.finished:
            return Corpus(self.folder, read_index(self.folder)).facts() | progress
        end = stream.read_end if tokens is None else tokens
        shards = stream.shards[: -(-end // stream.capacity)]
        return {
            **self.made_from(),
            "shards": [shard.sha256_tokens for shard in shards],
            "documents": sum(shard.documents for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            **progress,
        }


def open_arriving(
    folder: Path, rows: int | None = None, waiting: Waiting = lambda _: False
) -> Corpus | GrowingCorpus:
    """Open a corpus, finished or not, for a model with `rows` embeddings; waits until its options
    and its tokenizer are there.

    Raises as `stream.open_corpus`, and `EnvironmentFault` where no process prepares it.
    """
    watch = Watch(folder, waiting)
    while True:
        if underway.is_finished(folder):
            digest = _digest_beside(folder, read_index(folder).tokenizer)
            return open_corpus(folder, digest or "none", rows)
        unfinished = underway.unfinished(folder)
        digest = _digest_beside(folder, unfinished.tokenizer) if unfinished else None
        if unfinished is not None and digest is not None:
            check_fits(folder, unfinished, digest, rows)
            return GrowingCorpus(folder, unfinished, waiting)
        watch.pause(f"waiting for the preparation of {folder.name}")


def _digest_beside(folder: Path, recorded: str) -> str | None:
    """The digest of the tokenizer beside the shards, in the version of the recorded one."""
    return tokenizer_digest(folder / TOKENIZER, version_of(recorded))
