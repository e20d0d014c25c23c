"""Every byte of a corpus against its index: sha256 of all shards, and that documents and ids are
what the counts say.
"""

import hashlib
from pathlib import Path

import numpy as np

from finrepro.data.corpora.index import Index, Shard, read_index

BLOCK = 1 << 24  # bytes


def wrong_shards(folder: Path) -> tuple[Index, list[str]]:
    """The index, and a line for each thing that is wrong: the file and what is the matter.
    Raises `EnvironmentFault` without an index.
    """
    index = read_index(folder)
    wrong: list[str] = []
    for name, split in index.splits.items():
        for shard in split.shards:
            for kind, recorded in (
                ("tokens", shard.sha256_tokens),
                ("starts", shard.sha256_starts),
            ):
                said = _fault(folder / f"{shard.name}.{kind}", recorded)
                wrong += [f"{shard.name}.{kind}: {said}"] if said else []
        wrong += _miscounted(folder, index, name) if not wrong else []
    return index, wrong


def _fault(path: Path, recorded: str) -> str | None:
    """Why a file is not the recorded one, None if it is."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    found = digest.hexdigest()
    return (
        None
        if found == recorded
        else f"has sha256 {found[:12]}..., the index says {recorded[:12]}..."
    )


def _miscounted(folder: Path, index: Index, name: str) -> list[str]:
    """What the files say that the index does not: numbers of tokens and documents, ids,
    documents' first tokens.
    """
    split, wrong = index.splits[name], []
    for shard in split.shards:
        wrong += [f"{shard.name}: {said}" for said in _inside(folder, index, shard)]
    for what in ("tokens", "documents"):
        found = sum(getattr(shard, what) for shard in split.shards)
        if found != getattr(split, what):
            wrong.append(
                f"{name}: its shards have {found} {what}, the index says {getattr(split, what)}"
            )
    return wrong


def _inside(folder: Path, index: Index, shard: Shard) -> list[str]:
    tokens = np.fromfile(folder / f"{shard.name}.tokens", np.dtype(index.dtype).newbyteorder("<"))
    starts = np.fromfile(folder / f"{shard.name}.starts", "<u4")
    wrong = []
    if (len(tokens), len(starts)) != (shard.tokens, shard.documents):
        wrong.append(
            f"holds {len(tokens)} tokens and {len(starts)} documents, the index says {shard.tokens} and {shard.documents}"
        )
    elif len(tokens) and int(tokens.max()) >= index.vocabulary:
        wrong.append(f"holds the id {int(tokens.max())}, the tokenizer has {index.vocabulary}")
    elif len(starts) and (
        int(starts.max()) >= len(tokens) or (tokens[starts] != index.start_id).any()
    ):
        wrong.append("a document does not begin with the start token")
    return wrong
