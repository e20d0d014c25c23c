"""Text to ids, in this process or in several: the order and the ids are those of the documents,
whatever the number of processes.

The only part that knows a tokenizer's library. Special tokens written in a text ("<|endoftext|>")
are text here, not commands.
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

from finrepro.data.tokens import tokenizer_digest
from finrepro.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 18, 256  # what a process is given at a time
# Whose ids are kept, 10 MB a process; the library keeps 10,000, half of the different words of a
# megabyte of text.
CACHED_WORDS = 1 << 16
Ids = list[NDArray[np.uint32]]
T = TypeVar("T")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as a preparation needs it: its file's sha256, its number of ids, the token
    that begins a document, its rules as JSON.
    """

    digest: str
    vocabulary: int
    start_id: int
    rules: str


def load_encoder(folder: Path) -> Encoder:
    """The tokenizer in `folder`: one that Transformers reads, or GPT-2's own two files, vocab.json
    and merges.txt.

    Raises `EnvironmentFault` when there is none, `UsageError` for one that has no fast form, or
    neither a beginning-of-text nor an end-of-text token.
    """
    digest = tokenizer_digest(folder)
    if digest is None:
        raise EnvironmentFault(
            f"{folder} holds no tokenizer: no tokenizer.json, tokenizer.model, or vocab.json and merges.txt."
        )
    import transformers

    # GPT-2's release has these two files alone, from which the library cannot tell what they are.
    bare = (folder / "merges.txt").is_file() and not (folder / "tokenizer.json").is_file()
    kind: Any = transformers.GPT2TokenizerFast if bare else transformers.AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the libraries say of a damaged file
        said = f"{type(error).__name__} {error}".splitlines()[0]
        raise EnvironmentFault(f"{folder}: cannot load the tokenizer: {said}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{folder}: the tokenizer has no fast form, which preparing a corpus needs."
        )
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UsageError(
            f"{folder}: the tokenizer has neither a beginning-of-text nor an end-of-text token."
        )
    return Encoder(digest, len(tokenizer), start, tokenizer.backend_tokenizer.to_str())


@lru_cache(maxsize=1)  # reading GPT-2's takes a quarter of a second
def tokenizer_of(rules: str) -> "Tokenizer":
    """The tokenizer that does the work: it cuts nothing off, pads nothing and takes special
    tokens in a text for text.
    """
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(rules)
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    if hasattr(
        made.model, "_resize_cache"
    ):  # those of BPE and Unigram have one; it changes how fast, never which ids
        made.model._resize_cache(CACHED_WORDS)
    return made


def encode_texts(tokenizer: "Tokenizer", start: int, texts: list[str]) -> Ids:
    """Each text's ids, the start token first. A text of which the tokenizer leaves nothing is
    that token twice: no document is lost.
    """
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array([start, *(each.ids or [start])], np.uint32) for each in found]


def encode_in_order(
    encoder: Encoder, documents: Iterable[tuple[T, str | None]], workers: int
) -> Generator[tuple[T, NDArray[np.uint32] | None], None, None]:
    """(what came with it, ids) of each document, in order; a text None stays None. `workers` 1 is
    this process.

    So much is in the making at a time that every process has a batch to go on with, and no more.
    """
    if workers == 1:
        tokenizer = tokenizer_of(encoder.rules)
        for carried, texts in _batches(documents):
            yield from _matched(carried, encode_texts(tokenizer, encoder.start_id, texts))
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin, (encoder.rules, encoder.start_id)
    )
    pending: deque[tuple[list[tuple[T, bool]], Future[Ids]]] = deque()
    try:
        for carried, texts in _batches(documents):
            pending.append((carried, pool.submit(_encode, texts)))
            if len(pending) > 2 * workers:
                carried, future = pending.popleft()
                yield from _matched(carried, future.result())
        while pending:
            carried, future = pending.popleft()
            yield from _matched(carried, future.result())
    except BrokenProcessPool:
        raise EnvironmentFault(
            "a tokenizing process was killed (out of memory?): run the same command again to go on, with fewer --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(
    documents: Iterable[tuple[T, str | None]],
) -> Iterator[tuple[list[tuple[T, bool]], list[str]]]:
    """Batches of what is carried, each with whether it has a text, and the texts."""
    carried: list[tuple[T, bool]] = []
    texts: list[str] = []
    size = 0
    for what, text in documents:
        carried.append((what, text is not None))
        if text is not None:
            texts.append(text)
            size += len(text)
        if size >= BATCH_BYTES or len(carried) >= BATCH_DOCUMENTS:
            yield carried, texts
            carried, texts, size = [], [], 0
    if carried:
        yield carried, texts


def _matched(
    carried: list[tuple[T, bool]], ids: Ids
) -> Iterator[tuple[T, NDArray[np.uint32] | None]]:
    made = iter(ids)
    for what, has_text in carried:
        yield what, next(made) if has_text else None


_state: dict[str, Any] = {}


def _begin(rules: str, start: int) -> None:
    """A process's beginning. It ends with its parent, also when that one is killed, and leaves
    Ctrl-C to it.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _state.update(tokenizer=tokenizer_of(rules), start=start)


def _encode(texts: list[str]) -> Ids:
    return encode_texts(_state["tokenizer"], _state["start"], texts)
