"""From sources to a corpus of token shards: read, quarantine damaged documents, drop duplicates,
hold out, tokenize, write.

The result is a function of the documents in their order. A preparation that was interrupted
(killed, full disk) reads its sources from the beginning, tokenizes only the documents that no
complete shard holds, and ends with the same bytes, whatever the number of workers.
"""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic

from finrepro import strict_json
from finrepro.data.corpora.index import (
    FORMAT,
    INDEX,
    Index,
    Split,
    dtype_for,
    read_index,
    write_index,
    write_record,
)
from finrepro.data.preparing import underway
from finrepro.data.preparing.deduplicate import DuplicateFilter, identity, is_held_out
from finrepro.data.preparing.hub import HubSplit
from finrepro.data.preparing.quarantine import Quarantine, check_choice
from finrepro.data.preparing.sources import LocalFiles
from finrepro.data.preparing.tokenizing import Encoder, encode_in_order
from finrepro.data.preparing.writer import PREPARING, SplitWriter
from finrepro.errors import UsageError
from finrepro.evidence.files import disk_errors
from finrepro.settings import Count, plain, settings

Progress = Callable[[dict[str, int]], None]
SHARD_TOKENS = 2**26  # 128 MiB at 16 bits an id
PROGRESS_EVERY = 256  # documents


@settings
class PrepareOptions:
    """What decides the bytes, beside the sources and the tokenizer.

    `validation` is the fraction of documents that are held out, by a hash of their text and `seed`;
    0 where the sources have a validation split. `shard_tokens` is a shard's number of tokens.
    """

    validation: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.005
    seed: Count = 0
    shard_tokens: Annotated[int, pydantic.Field(ge=2, lt=2**32)] = SHARD_TOKENS


@dataclass(frozen=True)
class Sources:
    """Where the documents of training are read, and those of validation where they have sources."""

    train: Sequence[LocalFiles | HubSplit]
    validation: Sequence[LocalFiles | HubSplit] = ()

    @property
    def description(self) -> dict[str, Any]:
        """What the index records of them."""
        return {
            "train": [source.description for source in self.train],
            "validation": [source.description for source in self.validation],
        }

    @property
    def size(self) -> int | None:
        """Bytes of text, None where a source does not know."""
        sizes = [source.size for source in (*self.train, *self.validation)]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def prepare(
    sources: Sources,
    encoder: Encoder,
    folder: Path,
    options: PrepareOptions,
    *,
    workers: int = 1,
    on_error: str = "stop",
    progress: Progress = lambda _: None,
    before_writing: Callable[[], None] = lambda: None,
) -> Index:
    """Prepare the corpus in `folder`, or resume; a finished one is left as it is.

    `before_writing` is called before the first shard is written, to put beside the shards what
    their readers need (the tokenizer). `progress` gets the numbers of documents, bytes and tokens.

    Raises `UsageError` when the folder holds another corpus, `EnvironmentFault` for a full disk,
    damaged text (`on_error` stop), a hub that does not answer, sources that changed between two
    attempts, or when another process prepares the folder.
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
        with underway.lock(folder), _disk_errors(folder):
            try:
                index = _begin(folder, identities, encoder.digest_1)
                before_writing()
                if index is None:
                    index = _write(
                        sources,
                        encoder,
                        folder,
                        options,
                        workers,
                        Quarantine(folder, on_error),
                        progress,
                    )
                return index
            finally:
                # What resuming needs stays. A finished folder, or one that holds something else, is
                # left as it was.
                if (folder / INDEX).exists() or not (
                    folder / PREPARING / underway.OPTIONS
                ).exists():
                    shutil.rmtree(folder / PREPARING, ignore_errors=True)


def _disk_errors(folder: Path) -> AbstractContextManager[None]:
    advice = "whole shards are kept: make room and run the same command again"
    return disk_errors(folder, advice, option="--out")


def _begin(folder: Path, identities: dict[str, Any], digest_1: str) -> Index | None:
    """The index of a finished corpus; None after recording, or finding recorded, that this corpus
    is prepared here. Raises `UsageError` when the folder holds another.

    `digest_1` is the tokenizer's in version 1, which older preparations have recorded.
    """
    requested = strict_json.loads(strict_json.dumps(identities))
    if (folder / INDEX).exists():
        index = read_index(folder)
        recorded = {key: getattr(index, key) for key in requested}
    elif unfinished := underway.unfinished(folder):
        index, recorded = None, plain(unfinished)
    else:
        names = sorted(path.name for path in folder.iterdir() if path.name != PREPARING)
        if names:
            raise UsageError(f"{folder} is not empty (it holds {names[0]}): choose another --out.")
        write_record(folder / PREPARING / underway.OPTIONS, requested)
        return None
    if recorded["tokenizer"] == digest_1:
        requested["tokenizer"] = digest_1
    differing = [key for key in requested if requested[key] != recorded[key]]
    if differing:
        state = "" if index else " (not finished)"
        raise UsageError(
            f"{folder} holds a corpus of another {' and '.join(differing)}{state}: "
            "choose another --out, or delete it."
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


def _write(
    sources: Sources,
    encoder: Encoder,
    folder: Path,
    options: PrepareOptions,
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
    progress_counts = Counter({"documents": 0, "bytes": 0, "tokens": 0})
    ended = False
    submitted: Counter[str] = Counter()  # documents of each split that were given to the tokenizer

    def documents() -> Iterator[tuple[tuple[str, bytes, int], str | None]]:
        for name, key, size, text in _selected(sources, options, quarantine, counts):
            submitted[name] += 1
            on_disk = submitted[name] <= writers[name].documents_on_disk
            yield (name, key, size), None if on_disk else text

    try:
        with contextlib.closing(encode_in_order(encoder, documents(), workers)) as encoded:
            for (name, key, size), ids in encoded:
                writers[name].add(key, size, ids)
                tokens = 0 if ids is None else len(ids)
                progress_counts.update(documents=1, bytes=size, tokens=tokens)
                if progress_counts["documents"] % PROGRESS_EVERY == 0:
                    progress(dict(progress_counts))
        progress(dict(progress_counts))
        splits = {name: writer.finish() for name, writer in writers.items()}
        index = _index(encoder, dtype, options, sources, splits, counts, quarantine)
        ended = True
    finally:
        for writer in writers.values():
            writer.close()
        quarantine.close(ended)
    write_index(folder, index)
    return index


def _index(
    encoder: Encoder,
    dtype: Any,
    options: PrepareOptions,
    sources: Sources,
    splits: dict[str, Split],
    counts: Counter[str],
    quarantine: Quarantine,
) -> Index:
    """The index of a finished preparation. Raises `UsageError` without a document to train on."""
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
            "quarantined": quarantine.count,
            "reasons": dict(sorted(quarantine.reasons.items())),
        },
    )


def _selected(
    sources: Sources, options: PrepareOptions, quarantine: Quarantine, counts: Counter[str]
) -> Iterator[tuple[str, bytes, int, str]]:
    """(split, identity, UTF-8 bytes, text) of every document but the damaged, empty and duplicate
    ones, which are counted.

    The validation split's sources come first, so that a training document that also stands there is
    dropped as a duplicate.
    """
    duplicates = DuplicateFilter()
    for is_validation, source in [
        *((True, source) for source in sources.validation),
        *((False, source) for source in sources.train),
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
            if duplicates.contains_or_add(key):
                counts["duplicates"] += 1
                continue
            validation = is_validation or is_held_out(key, options.validation, options.seed)
            yield "validation" if validation else "train", key, size, document.text


def default_workers() -> int:
    """One process for each core that this one may run on."""
    return len(os.sched_getaffinity(0))
