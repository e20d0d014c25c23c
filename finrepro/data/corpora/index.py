"""`index.json`: what a folder of token shards holds, and whether this program can read it for this
model.

A split is one stream of tokens, document after document, each beginning with the start token. It is
cut into shards of `shard_tokens` tokens wherever that falls; a shard is two files, `NAME.tokens`
(little-endian, `dtype`) and `NAME.starts` (little-endian uint32: where in the shard a document
begins). The index is written last: a folder without it holds an unfinished preparation.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from finrepro import bounds
from finrepro.errors import EnvironmentFault, UsageError, unknown
from finrepro.evidence.files import json_text, write_bytes, write_json
from finrepro.settings import Count, Positive, build, plain, settings

FORMAT = 1
INDEX = "index.json"
SEAL = "index.json.sha256"  # as `sha256sum` writes it; corpora of older versions have none
Digest = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]
TokenizerDigest = Annotated[str, pydantic.Field(pattern="^(2:)?[0-9a-f]{64}$")]


@settings
class Shard:
    """One shard: its number of tokens, how many documents begin in it, and sha256 of both files."""

    name: str
    tokens: Positive
    documents: Count
    sha256_tokens: Digest
    sha256_starts: Digest


@settings
class Split:
    """One stream. `bytes` counts the UTF-8 bytes of its documents' text, for bits per byte;
    start tokens are among the `tokens`.
    """

    documents: Count
    tokens: Count
    bytes: Count
    shards: tuple[Shard, ...]


@settings
class Index:
    """The whole file. `source`, `options` and `counts` say how it was made
    (finrepro.data.preparing.prepare).
    """

    format: Positive
    tokenizer: TokenizerDigest
    vocabulary: Positive
    start_id: Count
    dtype: Literal["uint16", "uint32"]
    shard_tokens: Positive
    splits: dict[str, Split]
    source: dict[str, Any]
    options: dict[str, Any]
    counts: dict[str, Any]


@settings
class Unfinished:
    """`.preparing/options.json`: what an unfinished preparation is made from. The index of the
    finished one repeats it.
    """

    format: Positive
    tokenizer: TokenizerDigest
    vocabulary: Positive
    source: dict[str, Any]
    options: dict[str, Any]


def dtype_for(vocabulary: int) -> Literal["uint16", "uint32"]:
    """The smallest type that holds every id below `vocabulary`."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


def read_index(folder: Path) -> Index:
    """The checked index. Raises `EnvironmentFault` in one line for none, a damaged one, or one
    of another format version.
    """
    path = folder / INDEX
    try:
        content = bounds.read_bytes(path)
        values = bounds.loads(content)
    except FileNotFoundError:
        unfinished = " (a preparation was begun and has not ended: run it again)"
        hint = unfinished if (folder / ".preparing").is_dir() else ""
        raise EnvironmentFault(
            f"{folder} holds no prepared corpus: it has no {INDEX}{hint}."
        ) from None
    except OSError as error:
        raise EnvironmentFault(f"{path}: {error.strerror}.") from None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise EnvironmentFault(f"{path} is damaged: not a JSON object; prepare the corpus again.")
    if not _is_sealed(folder, content):
        raise EnvironmentFault(
            f"{path} is damaged: it is not what {SEAL} says; prepare the corpus again."
        )
    if values.get("format") != FORMAT:
        raise EnvironmentFault(
            f"{path} is of format {values.get('format')}, this program reads {FORMAT}: "
            "prepare again."
        )
    try:
        return build(Index, values, str(path))
    except UsageError as error:
        raise EnvironmentFault(f"{error} The index is damaged; prepare the corpus again.") from None


def write_record(path: Path, record: Any) -> None:
    """Write a shard's record or a preparation's options: whole or not at all, and on the disk
    before anything that is done after.
    """
    write_json(path, record, indent=1, durable=True)


def write_index(folder: Path, index: Index) -> None:
    """Write the index and its seal. The seal first: what has an index is finished.

    The bytes are part of the format: the index's sha256 is a corpus' identity.
    """
    content = json_text(plain(index), indent=1).encode()
    write_bytes(folder / SEAL, _seal(content), durable=True)
    write_bytes(folder / INDEX, content, durable=True)


def _is_sealed(folder: Path, content: bytes) -> bool:
    """Whether the index is what its seal says, or has none."""
    seal = folder / SEAL
    return not seal.exists() or seal.read_bytes() == _seal(content)


def _seal(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {INDEX}\n".encode()


def index_digest(folder: Path) -> str:
    """sha256 of the index file, which holds that of every shard: the identity of a prepared
    corpus.
    """
    return hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()


def check_fits(
    folder: Path, index: Index | Unfinished, tokenizer: str | None, rows: int | None
) -> None:
    """Raise `UsageError` unless the corpus was made with this tokenizer (its digest), and a model
    of `rows` embeddings has one for each of its ids. None: not checked.
    """
    if tokenizer is not None and tokenizer != index.tokenizer:
        raise UsageError(
            f"{folder} was made with another tokenizer (digest {index.tokenizer[:12]}..., "
            f"the model's is {tokenizer[:12]}...): prepare it again with the model's."
        )
    if rows is not None and index.vocabulary > rows:
        raise UsageError(
            f"{folder} holds ids up to {index.vocabulary - 1}, "
            f"the model has only {rows} embeddings."
        )


def split_of(folder: Path, index: Index, name: str) -> Split:
    """One split. Raises `UsageError` for an unknown one, naming the known, and for an empty one."""
    if name not in index.splits:
        raise unknown(f"split of {folder}", name, index.splits)
    if not index.splits[name].documents:
        raise UsageError(f"the split '{name}' of {folder} holds no document.")
    return index.splits[name]
