"""Checks every byte of a corpus against its index: sha256 of all shards, counts, ids."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from finrepro.data.corpora.folders import TOKENIZER
from finrepro.data.corpora.index import Index, Shard, read_index
from finrepro.data.tokenizer_files import tokenizer_digest, version_of
from finrepro.evidence.manifest import file_digest


def corpus_faults(folder: Path) -> tuple[Index, list[str]]:
    """The index, and a line for each fault: the file and what is wrong with it. Raises
    `EnvironmentFault` without an index.
    """
    index = read_index(folder)
    faults: list[str] = []
    tokenizer = folder / TOKENIZER
    if tokenizer.exists():
        digest = tokenizer_digest(tokenizer, version_of(index.tokenizer))
        faults += [] if digest == index.tokenizer else [f"{TOKENIZER}: not that of the tokens"]
    for name in index.splits:
        faults += shard_faults(folder, index, name)
        faults += _split_faults(folder, index, name) if not faults else []
    return index, faults


def shard_faults(
    folder: Path, index: Index, split: str, digest: Callable[[Path], str] = file_digest
) -> list[str]:
    """A line for each file of a split that is not the recorded one; `digest` gives the sha256."""
    shards = index.splits[split].shards
    return [fault for shard in shards for fault in file_faults(folder, shard, digest)]


def file_faults(
    folder: Path, shard: Shard, digest: Callable[[Path], str] = file_digest
) -> list[str]:
    """A line for each of a shard's two files that is not the recorded one."""
    faults: list[str] = []
    for kind, recorded in (("tokens", shard.sha256_tokens), ("starts", shard.sha256_starts)):
        fault = _file_fault(folder / f"{shard.name}.{kind}", recorded, digest)
        faults += [f"{shard.name}.{kind}: {fault}"] if fault else []
    return faults


def _file_fault(path: Path, recorded: str, digest: Callable[[Path], str]) -> str | None:
    """Why a file is not the recorded one, None if it is."""
    try:
        found = digest(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if found == recorded:
        return None
    return f"has sha256 {found[:12]}..., the index says {recorded[:12]}..."


def _split_faults(folder: Path, index: Index, name: str) -> list[str]:
    """Where a split's files differ from the index: numbers of tokens and documents, ids, documents'
    first tokens.
    """
    split, faults = index.splits[name], []
    for shard in split.shards:
        fault = _shard_fault(folder, index, shard)
        faults += [f"{shard.name}: {fault}"] if fault else []
    for unit in ("tokens", "documents"):
        total, recorded = sum(getattr(shard, unit) for shard in split.shards), getattr(split, unit)
        if total != recorded:
            faults.append(f"{name}: its shards have {total} {unit}, the index says {recorded}")
    return faults


def _shard_fault(folder: Path, index: Index, shard: Shard) -> str | None:
    tokens = np.fromfile(folder / f"{shard.name}.tokens", np.dtype(index.dtype).newbyteorder("<"))
    starts = np.fromfile(folder / f"{shard.name}.starts", "<u4")
    if (len(tokens), len(starts)) != (shard.tokens, shard.documents):
        return (
            f"holds {len(tokens)} tokens and {len(starts)} documents, "
            f"the index says {shard.tokens} and {shard.documents}"
        )
    if len(tokens) and int(tokens.max()) >= index.vocabulary:
        return f"holds the id {int(tokens.max())}, the tokenizer has {index.vocabulary}"
    if len(starts) and (
        int(starts.max()) >= len(tokens) or (tokens[starts] != index.start_id).any()
    ):
        return "a document does not begin with the start token"
    return None
