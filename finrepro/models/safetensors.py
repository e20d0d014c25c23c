"""The contents of a checkpoint folder, from its configuration, its index and the headers of its
files: no torch, and no tensor is read.

The format is safetensors: eight bytes with the header's length, a JSON header that gives each
tensor's dtype, shape and place, the tensors (https://huggingface.co/docs/safetensors, "Format").
Pickles are never read.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finrepro.catalogue.spec import SIZES
from finrepro.data import lfs
from finrepro.errors import EnvironmentFault

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# the least share of an embedding's rows that a tokenizer fills: some embeddings are padded
FILLED = 0.9
ROUNDING = 1e-7  # relative; a number that was kept in float32 is off by at most 6e-8
ALIASES = {"swish": "silu"}  # Transformers' names of one activation
MAX_HEADER = 100_000_000  # bytes; the format's own limit
# Configuration keys that decide what is computed. Dropout, token ids, the dtype and the longest
# context are the run's own settings.
COMPUTED = {
    "gpt2": (
        *SIZES["gpt2"],
        "n_inner",
        "activation_function",
        "layer_norm_epsilon",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
    ),
    "llama": (
        *SIZES["llama"],
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
    ),
}


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
        content = json.loads(path.read_text(encoding="utf-8"))
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
            content = json.loads(file.read(length))
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


def compare_configuration(
    name: str, family: str, architecture: Mapping[str, Any], folder: Path
) -> None:
    """Compare config.json with the catalogue: the family, and every key of `architecture` that
    decides what is computed.

    A key that config.json leaves out is not compared, and one that is null stands for what the
    model's class makes of it. Raises `EnvironmentFault` naming the key and
    both values.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != family:
        raise another(folder, name, "model_type", config.get("model_type"), family)
    if config.get("quantization_config"):
        raise EnvironmentFault(
            f"the checkpoint in {folder} is quantized already: {name} needs the original weights."
        )
    expected = {**architecture, **_derived(family, architecture)}
    derived = _derived(family, {**architecture, **config})
    for key in COMPUTED[family]:
        value = config.get(key)
        if value is None and key in config:
            value = derived.get(key)
        if value is not None and expected.get(key) is not None and not _same(value, expected[key]):
            raise another(folder, name, key, value, expected[key])
    if family == "llama" and isinstance(architecture.get("rope_parameters"), dict):
        rope = _rope(config)
        for key, value in sorted(architecture["rope_parameters"].items()):
            if not _same(rope.get(key), value):
                raise another(folder, name, f"rope_parameters.{key}", rope.get(key), value)


def _derived(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What Transformers computes for the keys that a configuration has as null."""
    try:
        if family == "gpt2":
            values = {"n_inner": 4 * config["n_embd"]}
        else:
            heads = config["num_attention_heads"]
            values = {
                "num_key_value_heads": heads,
                "head_dim": config["hidden_size"] // heads,
            }
    except (KeyError, TypeError, ZeroDivisionError):  # the sizes themselves are compared
        return {}
    return {key: value for key, value in values.items() if config.get(key) is None}


def _same(value: Any, expected: Any) -> bool:
    """Whether two settings compute the same: equal, equal as float32, or names of one function."""
    numbers = [
        isinstance(each, int | float) and not isinstance(each, bool) for each in (value, expected)
    ]
    if all(numbers):
        return math.isclose(value, expected, rel_tol=ROUNDING)
    if isinstance(value, str) and isinstance(expected, str):
        return ALIASES.get(value, value) == ALIASES.get(expected, expected)
    return bool(value == expected)


def another(folder: Path, name: str, key: str, value: Any, expected: Any) -> EnvironmentFault:
    """The error for a checkpoint of another model: the key that differs, and both values."""
    return EnvironmentFault(
        f"the checkpoint in {folder} is not {name}: {key} is {value!r}, {name} has {expected!r}."
    )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings as Transformers 5 writes them, also from the two keys of older versions, or
    with the base beside them.
    """
    if isinstance(config.get("rope_parameters"), dict):
        theta = config.get("rope_theta", 10000.0)
        return {"rope_theta": theta, "rope_type": "default", **config["rope_parameters"]}
    old = dict(config.get("rope_scaling") or {})
    kind = old.pop("rope_type", old.pop("type", "default"))
    return {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": kind, **old}


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
