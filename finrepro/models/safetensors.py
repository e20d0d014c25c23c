"""The contents of a checkpoint folder, from its configuration, its index and the headers of its
files: no torch, and no tensor is read.

The format is safetensors: eight bytes with the header's length, a JSON header that gives each
tensor's dtype, shape and place, the tensors (https://huggingface.co/docs/safetensors, "Format").
Pickles are never read.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finrepro import bounds
from finrepro.data import lfs
from finrepro.errors import EnvironmentFault

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# the least share of an embedding's rows that a tokenizer fills: some embeddings are padded
FILLED = 0.9
MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: its file, its dtype in the format's words ("BF16"), its shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `EnvironmentFault` naming the file."""
    try:
        if lfs.is_pointer(path):
            raise EnvironmentFault(f"{path}: {lfs.ADVICE}.")
        content = bounds.read_json(path)
    except FileNotFoundError:
        raise EnvironmentFault(f"{path.parent}: the checkpoint lacks {path.name}.") from None
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            f"{path}: not readable JSON: {str(error).splitlines()[0]}."
        ) from None
    if not isinstance(content, dict):
        raise EnvironmentFault(
            f"{path}: a JSON object is expected, not a {type(content).__name__}."
        )
    return content


def files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a checkpoint: model.safetensors, or the shards that its index names.

    Raises `EnvironmentFault` when there are none, the index is corrupt or a shard is absent.
    """
    if (folder / WHOLE).is_file():
        return (folder / WHOLE,)
    if not (folder / INDEX).is_file():
        raise EnvironmentFault(f"{folder}: {without_weights(folder)}.")
    names = read_json(folder / INDEX).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(name, str) for name in names.values())
    ):
        raise EnvironmentFault(f"{folder / INDEX}: 'weight_map' must map tensors to files.")
    shards = sorted(set(names.values()))
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise EnvironmentFault(
            f"{folder / INDEX}: names {outside[0]!r}, which is no file of this folder."
        )
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent:
        raise EnvironmentFault(
            f"{folder}: {len(absent)} of {len(shards)} shards are absent, the first is {absent[0]}."
        )
    return tuple(folder / name for name in shards)


def without_weights(folder: Path) -> str:
    """Why a folder without safetensors cannot be used."""
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if not pickles:
        return f"no weights: neither {WHOLE} nor {INDEX} is there"
    return (
        f"only pickled weights ({pickles[0].name}), which are never read: "
        "a safetensors version of them is needed"
    )


def header(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises `EnvironmentFault` when the file is truncated, or is
    something else.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if lfs.is_pointer(path):
                raise EnvironmentFault(f"{path}: {lfs.ADVICE}.")
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, max(size - 8, 0)):
                raise EnvironmentFault(f"{path}: truncated, or no safetensors file ({size} bytes).")
            content = bounds.loads(file.read(length))
        content.pop("__metadata__", None)
        entries = {
            name: Entry(path, fields["dtype"], tuple(fields["shape"]))
            for name, fields in content.items()
        }
        ends = (fields["data_offsets"][1] for fields in content.values())
        end = 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EnvironmentFault(f"{path}: no safetensors file: {type(error).__name__}.") from None
    if size != end:
        raise EnvironmentFault(
            f"{path}: {size} bytes, its header says {end}: truncated or damaged."
        )
    return entries


def tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint. Raises `EnvironmentFault` as `files` and `header` do, and
    when files and index disagree.
    """
    entries: dict[str, Entry] = {}
    for path in files(folder):
        for name, entry in header(path).items():
            if name in entries:
                raise EnvironmentFault(
                    f"{folder}: {name} stands in {entries[name].path.name} and in {path.name}."
                )
            entries[name] = entry
    if not (folder / WHOLE).is_file():
        for name, shard in read_json(folder / INDEX)["weight_map"].items():
            if name not in entries or entries[name].path.name != shard:
                raise EnvironmentFault(
                    f"{folder}: the index says that {name} is in {shard}, and it is not."
                )
    return entries


def another(folder: Path, name: str, key: str, value: Any, expected: Any) -> EnvironmentFault:
    """The error for a checkpoint of another model: the key that differs, and both values."""
    return EnvironmentFault(
        f"the checkpoint in {folder} is not {name}: {key} is {value!r}, {name} has {expected!r}."
    )


def compare_tokenizer(name: str, rows: int, folder: Path) -> None:
    """Compare the tokenizer's files with the embedding's `rows`: every token needs a row.

    Raises `EnvironmentFault`, also when there is no tokenizer, or a SentencePiece file alone.
    """
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        try:
            vocabulary = (content.get("model") or {}).get("vocab") or {}
            ids = (
                list(vocabulary.values())
                if isinstance(vocabulary, dict)
                else list(range(len(vocabulary)))
            )
            ids += [token["id"] for token in content.get("added_tokens") or []]
        except (AttributeError, KeyError, TypeError):
            raise EnvironmentFault(
                f"{folder / 'tokenizer.json'}: not a tokenizer's file."
            ) from None
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        ids = list(read_json(folder / "vocab.json").values())
    else:
        pieces = (folder / "tokenizer.model").is_file()
        alone = " (tokenizer.model alone cannot be read here)" if pieces else ""
        raise EnvironmentFault(
            f"{folder}: the checkpoint of {name} lacks its tokenizer{alone}: tokenizer.json, as "
            "AutoTokenizer.save_pretrained writes it, or vocab.json with merges.txt."
        )
    if not ids or not all(isinstance(token_id, int) for token_id in ids):
        raise EnvironmentFault(f"{folder}: the tokenizer of {name} has no tokens.")
    if max(ids) >= rows:
        raise too_many_tokens(folder, name, max(ids) + 1, rows)
    if len(set(ids)) < FILLED * rows:
        raise EnvironmentFault(
            f"{folder}: the tokenizer has {len(set(ids))} tokens, "
            f"the embedding of {name} has {rows} rows: it is another model's."
        )


def too_many_tokens(folder: Path, name: str, tokens: int, rows: int) -> EnvironmentFault:
    """The error for a tokenizer with ids that the embedding has no row for."""
    return EnvironmentFault(
        f"{folder}: the tokenizer has {tokens} tokens, the embedding of {name} has {rows} rows."
    )
