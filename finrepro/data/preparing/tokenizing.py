"""Text to token ids, in this process or in several: the number of processes changes neither the ids
nor their order.

The only module of a preparation that knows the tokenizer libraries. A special token written out in
a text ("<|endoftext|>") is encoded as text.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from finrepro.data.tokenizer_files import check_bounds, tokenizer_digest
from finrepro.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 18, 256  # of a worker's task
# Words whose ids are cached, 10 MB a process. The library's default, 10,000, is half of the
# different words of a megabyte of text.
CACHED_WORDS = 1 << 16
Ids = list[NDArray[np.uint32]]
T = TypeVar("T")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer: the `digest` of its files and that of version 1, its number of ids, the id that
    begins a document, and its definition as JSON.
    """

    digest: str
    digest_1: str
    vocabulary: int
    start_id: int
    definition: str


def load_encoder(folder: Path) -> Encoder:
    """The tokenizer in `folder`: one that Transformers reads, or GPT-2's own two files, vocab.json
    and merges.txt.

    Raises `EnvironmentFault` when there is none, `UsageError` for one that has no fast form, or
    neither a beginning-of-text nor an end-of-text token.
    """
    digest = tokenizer_digest(folder)
    if digest is None:
        raise EnvironmentFault(
            f"{folder} holds no tokenizer: no tokenizer.json, tokenizer.model, or vocab.json and "
            "merges.txt."
        )
    import transformers

    check_bounds(folder)
    # GPT-2's release has these two files alone, from which the library cannot tell what they are.
    bare = (folder / "merges.txt").is_file() and not (folder / "tokenizer.json").is_file()
    kind: Any = transformers.GPT2TokenizerFast if bare else transformers.AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries' errors for a damaged file are many
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise EnvironmentFault(f"{folder}: cannot load the tokenizer: {reason}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{folder}: the tokenizer has no fast form, which preparing a corpus needs."
        )
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UsageError(
            f"{folder}: the tokenizer has neither a beginning-of-text nor an end-of-text token."
        )
    digest_1 = str(tokenizer_digest(folder, version=1))
    return Encoder(digest, digest_1, len(tokenizer), start, tokenizer.backend_tokenizer.to_str())


@lru_cache(maxsize=1)  # reading GPT-2's takes a quarter of a second
def tokenizer_of(definition: str) -> "Tokenizer":
    """The tokenizer of a definition, without truncation, padding, or special tokens in a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    # BPE and Unigram have a cache; it changes the speed, never the ids.
    if hasattr(tokenizer.model, "_resize_cache"):
        tokenizer.model._resize_cache(CACHED_WORDS)
    return tokenizer


def encode_texts(tokenizer: "Tokenizer", start: int, texts: list[str]) -> Ids:
    """Each text's ids, the start token first. A text without any id becomes that token twice: no
    document is lost.
    """
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array([start, *(encoding.ids or [start])], np.uint32) for encoding in encodings]


def encode_in_order(
    encoder: Encoder, documents: Iterable[tuple[T, str | None]], workers: int
) -> Generator[tuple[T, NDArray[np.uint32] | None], None, None]:
    """(key, ids) of each (key, text), in order; a text None has ids None. `workers` 1: in this
    process.

    At most two batches a worker are pending, so that none has to wait and memory stays bounded.
    """
    if workers == 1:
        tokenizer = tokenizer_of(encoder.definition)
        for keys, texts in _batches(documents):
            yield from _matched(keys, encode_texts(tokenizer, encoder.start_id, texts))
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (encoder.definition, encoder.start_id),
    )
    pending: deque[tuple[list[tuple[T, bool]], Future[Ids]]] = deque()
    try:
        for keys, texts in _batches(documents):
            pending.append((keys, pool.submit(_encode, texts)))
            if len(pending) > 2 * workers:
                keys, future = pending.popleft()
                yield from _matched(keys, future.result())
        while pending:
            keys, future = pending.popleft()
            yield from _matched(keys, future.result())
    except BrokenProcessPool:
        raise EnvironmentFault(
            "a tokenizing process was killed (out of memory?): "
            "run the same command again to go on, with fewer --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(
    documents: Iterable[tuple[T, str | None]],
) -> Iterator[tuple[list[tuple[T, bool]], list[str]]]:
    """Batches: the documents' keys, each with whether it has a text, and the texts."""
    keys: list[tuple[T, bool]] = []
    texts: list[str] = []
    size = 0
    for key, text in documents:
        keys.append((key, text is not None))
        if text is not None:
            texts.append(text)
            size += len(text)
        if size >= BATCH_BYTES or len(keys) >= BATCH_DOCUMENTS:
            yield keys, texts
            keys, texts, size = [], [], 0
    if keys:
        yield keys, texts


def _matched(keys: list[tuple[T, bool]], ids: Ids) -> Iterator[tuple[T, NDArray[np.uint32] | None]]:
    """(key, ids) of a batch's documents; None for a document without a text."""
    remaining = iter(ids)
    for key, has_text in keys:
        yield key, next(remaining) if has_text else None


_state: dict[str, Any] = {}


def _start_worker(definition: str, start: int) -> None:
    """Set up a worker process. It ends with its parent, also when the parent is killed, and leaves
    Ctrl-C to the parent.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _state.update(tokenizer=tokenizer_of(definition), start=start)


def _encode(texts: list[str]) -> Ids:
    return encode_texts(_state["tokenizer"], _state["start"], texts)
