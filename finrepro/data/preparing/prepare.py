"""From sources to a corpus of token shards: read, set aside what is damaged, drop duplicates, hold
out, tokenize, write.

All of it is a function of the documents in their order, so that a preparation that was cut short
(killed, full disk) reads its sources again from the beginning, tokenizes only what is in no whole
shard yet, and ends with the same bytes, whatever the number of workers.
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic

from finrepro.data.corpora.index import (
    FORMAT,
    INDEX,
    Index,
    Split,
    dtype_for,
    read_index,
    write_record,
)
from finrepro.data.preparing.deduplicate import Seen, held_out, identity
from finrepro.data.preparing.hub import Hub
from finrepro.data.preparing.quarantine import Quarantine, check_choice
from finrepro.data.preparing.sources import Local
from finrepro.data.preparing.tokenizing import Encoder, encode_in_order
from finrepro.data.preparing.underway import BEGUN, alone, begun
from finrepro.data.preparing.writer import PREPARING, SplitWriter
from finrepro.errors import UsageError
from finrepro.evidence.files import disk_errors
from finrepro.settings import Count, plain, settings

Progress = Callable[[dict[str, int]], None]
SHARD_TOKENS = 2**26  # 128 MiB at 16 bits an id
EVERY = 256  # documents between two reports of progress


@settings
class Options:
    """What decides the bytes, beside the sources and the tokenizer.

    `validation` is the fraction of documents that are held out by a hash of their text and `seed`;
    0 where the sources name their own.
    """

    validation: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.005
    seed: Count = 0
    shard_tokens: Annotated[int, pydantic.Field(ge=2, lt=2**32)] = SHARD_TOKENS


@dataclass(frozen=True)
class Sources:
    """The documents, and those of a validation split of its own where there is one."""

    train: Sequence[Local | Hub]
    validation: Sequence[Local | Hub] = ()

    @property
    def description(self) -> dict[str, Any]:
        """What the index says of them."""
        return {
            "train": [each.description for each in self.train],
            "validation": [each.description for each in self.validation],
        }

    @property
    def size(self) -> int | None:
        """Bytes of text, None if one does not know."""
        sizes = [each.size for each in (*self.train, *self.validation)]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def prepare(
    sources: Sources,
    encoder: Encoder,
    folder: Path,
    options: Options,
    *,
    workers: int = 1,
    on_error: str = "stop",
    progress: Progress = lambda _: None,
    keep: Callable[[], None] = lambda: None,
) -> Index:
    """Make the corpus in `folder`, or go on making it; one that is made is left as it is.

    `keep` is called before the first shard is written, to put beside the shards what those need who
    follow them (the tokenizer).

    Raises `UsageError` when the folder holds another corpus, `EnvironmentFault` for a full disk,
    damaged text (`on_error` stop), a hub that cannot be had, sources that changed between two
    attempts, or when another process is at work there.
    """
    if sources.validation and options.validation:
        raise UsageError(
            "these sources have a validation split of their own: --validation must be 0."
        )
    check_choice(on_error)
    identities = {
        "format": FORMAT,
        "tokenizer": encoder.digest,
        "vocabulary": encoder.vocabulary,
        "source": sources.description,
        "options": plain(options),
    }
    with _disk_errors(folder):
        (folder / PREPARING).mkdir(parents=True, exist_ok=True)
        with alone(folder), _disk_errors(folder):
            try:
                made = _begun(folder, identities)
                keep()
                if made is None:
                    made = _make(
                        sources,
                        encoder,
                        folder,
                        options,
                        workers,
                        Quarantine(folder, on_error),
                        progress,
                    )
                return made
            finally:  # what is needed to go on stays; a folder that is finished, or not ours, is left as it was
                if (folder / INDEX).exists() or not (folder / PREPARING / BEGUN).exists():
                    shutil.rmtree(folder / PREPARING, ignore_errors=True)


def _disk_errors(folder: Path) -> AbstractContextManager[None]:
    kept = "whole shards are kept: make room and run the same command again"
    return disk_errors(folder, kept, option="--out")


def _begun(folder: Path, identities: dict[str, Any]) -> Index | None:
    """The finished index, or None after noting what is made here. Raises `UsageError` when it is
    something else.
    """
    here = json.loads(json.dumps(identities))
    if (folder / INDEX).exists():
        index = read_index(folder)
        found = {key: getattr(index, key) for key in here}
    elif noted := begun(folder):
        index, found = None, plain(noted)
    else:
        others = [path.name for path in folder.iterdir() if path.name != PREPARING]
        if others:
            raise UsageError(
                f"{folder} is not empty (it holds {sorted(others)[0]}): choose another --out."
            )
        write_record(folder / PREPARING / BEGUN, here)
        return None
    differ = [key for key in here if here[key] != found[key]]
    if differ:
        state = "" if index else " (not finished)"
        raise UsageError(
            f"{folder} holds a corpus of another {' and '.join(differ)}{state}: choose another --out, or delete it."
        )
    if index is None:
        _remove_partial(folder)
    return index


def _remove_partial(folder: Path) -> None:
    """Remove what a process that was killed has left under hidden names."""
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _make(
    sources: Sources,
    encoder: Encoder,
    folder: Path,
    options: Options,
    workers: int,
    quarantine: Quarantine,
    progress: Progress,
) -> Index:
    dtype = dtype_for(encoder.vocabulary)
    writers = {
        name: SplitWriter(folder, name, dtype, options.shard_tokens)
        for name in ("train", "validation")
    }
    counts = Counter({"duplicates": 0, "empty": 0})
    done = Counter({"documents": 0, "bytes": 0, "tokens": 0})
    ended = False
    ahead: Counter[str] = Counter()  # documents that are on their way to each writer

    def documents() -> Iterator[tuple[tuple[str, bytes, int], str | None]]:
        for name, key, size, text in _chosen(sources, options, quarantine, counts):
            ahead[name] += 1
            on_disk = ahead[name] <= writers[name].documents_on_disk
            yield (name, key, size), None if on_disk else text

    try:
        with contextlib.closing(encode_in_order(encoder, documents(), workers)) as encoded:
            for (name, key, size), ids in encoded:
                writers[name].add(key, size, ids)
                done.update(documents=1, bytes=size, tokens=0 if ids is None else len(ids))
                if done["documents"] % EVERY == 0:
                    progress(dict(done))
        progress(dict(done))
        splits = {name: writer.finish() for name, writer in writers.items()}
        index = _index(encoder, dtype, options, sources, splits, counts, quarantine)
        ended = True
    finally:
        for writer in writers.values():
            writer.close()
        quarantine.close(ended)
    write_record(folder / INDEX, plain(index))
    return index


def _index(
    encoder: Encoder,
    dtype: Any,
    options: Options,
    sources: Sources,
    splits: dict[str, Split],
    counts: Counter[str],
    aside: Quarantine,
) -> Index:
    """The record of a finished preparation. Raises `UsageError` when there is nothing to record."""
    if not splits["train"].documents:
        raise UsageError("the sources hold no document to train on.")
    return Index(
        format=FORMAT,
        tokenizer=encoder.digest,
        vocabulary=encoder.vocabulary,
        start_id=encoder.start_id,
        dtype=dtype,
        shard_tokens=options.shard_tokens,
        splits=splits,
        source=sources.description,
        options=plain(options),
        counts={
            **counts,
            "quarantined": aside.count,
            "reasons": dict(sorted(aside.reasons.items())),
        },
    )


def _chosen(
    sources: Sources, options: Options, quarantine: Quarantine, counts: Counter[str]
) -> Iterator[tuple[str, bytes, int, str]]:
    """(split, identity, UTF-8 bytes, text) of every document that is kept.

    The validation split's own sources come first: a training document that is also there is dropped
    as their duplicate.
    """
    seen = Seen()
    for own, source in [
        *((True, each) for each in sources.validation),
        *((False, each) for each in sources.train),
    ]:
        for name, document in source.read(quarantine.fault):
            try:
                size = len(document.text.encode())
            except UnicodeEncodeError:
                quarantine.fault(
                    name, document.line, "text that UTF-8 does not have (half of a surrogate pair)"
                )
                continue
            if not document.text.strip():
                counts["empty"] += 1
                continue
            key = identity(document.text)
            if seen.before(key):
                counts["duplicates"] += 1
                continue
            held = own or held_out(key, options.validation, options.seed)
            yield "validation" if held else "train", key, size, document.text


def default_workers() -> int:
    """A process a core that this one may run on."""
    return len(os.sched_getaffinity(0))
