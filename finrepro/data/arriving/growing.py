"""A corpus that is read while it is being written: the same tokens at the same positions as when it
is finished, as soon as they are there.

What is whole is told by the shards' records, and by the index once there is one. Asked for more,
the stream waits; it never guesses. So what is read depends on the text alone, not on when it
arrived.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finrepro.data.corpora.folders import TOKENIZER
from finrepro.data.corpora.index import Begun, check_fits, dtype_for, read_index, split_of
from finrepro.data.corpora.stream import Corpus, Tokens, TokenStream, open_corpus
from finrepro.data.preparing import underway
from finrepro.data.preparing.writer import whole_shard
from finrepro.data.tokens import tokenizer_digest
from finrepro.errors import EnvironmentFault, Unavailable
from finrepro.runtime import ranks
from finrepro.settings import plain

PAUSE_SECONDS = 0.1
PATIENCE_SECONDS = 60.0  # that nobody need be at work: who takes over has to start first

# Called with what is waited for. It may raise, in order to stop waiting, and says whether somebody
# is about to go to work.
Waiting = Callable[[str], bool]


class Watch:
    """Waits for those who prepare a folder; `seconds` in all."""

    def __init__(self, folder: Path, waiting: Waiting = lambda _: False) -> None:
        self.folder, self.seconds, self._waiting = folder, 0.0, waiting
        self._idle: float | None = None

    def pause(self, what: str) -> None:
        """Wait a moment. Raises `EnvironmentFault` when nobody has been at work for a minute,
        with the reason that the last one left.
        """
        began = time.monotonic()
        if self._waiting(what) or underway.held(self.folder):
            self._idle = None
        else:
            self._idle = self._idle if self._idle is not None else began
            # The first rank knows who is about to start, and ends the others when it ends.
            given_up = began - self._idle >= PATIENCE_SECONDS and ranks.current().is_main
            if given_up and not underway.is_finished(self.folder):
                reason = (
                    underway.failure(self.folder)
                    or "it was killed, or never begun: invoke data --prepare goes on with it"
                )
                raise EnvironmentFault(f"{self.folder}: the preparation has stopped: {reason}")
        time.sleep(PAUSE_SECONDS)
        self.seconds += time.monotonic() - began


class GrowingStream(TokenStream):
    """A split of a corpus that need not be finished. Its length and number of documents are
    known at the end alone: asking waits for it.
    """

    def __init__(self, folder: Path, begun: Begun, split: str, watch: Watch) -> None:
        self._begin(folder, dtype_for(begun.vocabulary), int(begun.options["shard_tokens"]))
        self.begun, self.split, self.watch = begun, split, watch
        self.finished, self.read, self._length = (
            False,
            0,
            0,
        )  # `read`: the last token that was, and one
        self.look()

    def look(self) -> None:
        """Map what has become whole. Raises `EnvironmentFault` where the finished corpus is not
        the one that was begun.
        """
        if self.finished:
            return
        if underway.is_finished(self.folder):
            self._finish()
            return
        id_bytes = self.dtype.itemsize
        while found := whole_shard(
            self.folder, f"{self.split}-{len(self.shards):05d}", self.capacity, id_bytes
        ):
            self._add(found[0])
            self._length += self.capacity

    def _finish(self) -> None:
        index = read_index(self.folder)
        split = split_of(self.folder, index, self.split)
        same = all(getattr(index, key) == value for key, value in plain(self.begun).items())
        if not same or list(split.shards[: len(self.shards)]) != self.shards:
            raise EnvironmentFault(
                f"{self.folder}: the corpus was replaced by another one while it was read."
            )
        self._complete(split)
        self.finished = True

    def reaches(self, count: int) -> bool:
        """Whether there are so many tokens; waits until that is known."""
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
                raise Unavailable(
                    str(error)
                ) from None  # nothing was learned from it: the cell is skipped
        return count <= self._length

    def tokens(self, begin: int, end: int) -> Tokens:
        """Ids at positions [begin, end), as soon as they are there."""
        self.reaches(end)
        self.read = max(self.read, min(end, self._length))
        return super().tokens(begin, end)

    def __len__(self) -> int:
        """Tokens, start tokens included; waits for the end."""
        self.reaches(sys.maxsize)
        return self._length


class GrowingCorpus:
    """An opened corpus that was not finished when it was opened. As `stream.Corpus`, of the
    training split alone.
    """

    def __init__(self, folder: Path, begun: Begun, waiting: Waiting) -> None:
        self.folder, self.index = folder, begun
        self._stream = GrowingStream(folder, begun, "train", Watch(folder, waiting))

    def stream(self) -> GrowingStream:
        """The tokens of the training split."""
        return self._stream

    def made_from(self) -> dict[str, Any]:
        """What decides every byte of it."""
        found: dict[str, Any] = plain(self.index)
        return found

    def facts(self, tokens: int | None = None) -> dict[str, Any]:
        """What goes into a result: as of a finished corpus if it is one by now, else what it is
        of and the sha256 of the shards that hold the first `tokens`; by default of what this
        process has read."""
        stream = self._stream
        stream.look()
        waited = {"finished": stream.finished, "waited_seconds": round(stream.watch.seconds, 1)}
        if stream.finished:
            return Corpus(self.folder, read_index(self.folder)).facts() | waited
        read = stream.shards[: -(-(stream.read if tokens is None else tokens) // stream.capacity)]
        return {
            **self.made_from(),
            "shards": [shard.sha256_tokens for shard in read],
            "documents": sum(shard.documents for shard in read),
            "tokens": sum(shard.tokens for shard in read),
            **waited,
        }


def open_arriving(
    folder: Path, rows: int | None = None, waiting: Waiting = lambda _: False
) -> Corpus | GrowingCorpus:
    """Open a corpus for a model with so many embeddings, finished or not; waits until it is known
    what it is, and its tokenizer is there.

    Raises as `stream.open_corpus`, and `EnvironmentFault` where nobody is at work.
    """
    watch = Watch(folder, waiting)
    while True:
        kept = tokenizer_digest(folder / TOKENIZER)
        if underway.is_finished(folder):
            return open_corpus(folder, kept or "none", rows)
        begun = underway.begun(folder)
        if begun is not None and kept is not None:
            check_fits(folder, begun, kept, rows)
            return GrowingCorpus(folder, begun, waiting)
        watch.pause(f"waiting for the preparation of {folder.name}")
