"""What Transformers 5 writes about a model and its tokenizer, in words that Transformers 4 reads
too.

Version 5 keeps the rotary base and its scaling under one key, which version 4 passes over without
a word: it then computes with a base of 10,000 and no scaling.
"""

from pathlib import Path
from typing import Any

from finrepro import bounds, strict_json

# Of how the tokenizer was loaded here; they mean nothing elsewhere.
LOCAL = ("is_local", "local_files_only")


def write_for_both(folder: Path) -> None:
    """Add to config.json the keys of version 4, and give tokenizer_config.json a class that both
    versions have. Version 5 makes the same model and tokenizer of them as before.
    """
    config = _read(folder / "config.json")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        is_plain = scaling.get("rope_type", "default") == "default"
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if is_plain else scaling}
        _write(folder / "config.json", config)
    tokenizer = _read(folder / "tokenizer_config.json")
    tokenizer = {key: value for key, value in tokenizer.items() if key not in LOCAL}
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write(folder / "tokenizer_config.json", tokenizer)


def _read(path: Path) -> dict[str, Any]:
    return dict(bounds.read_json(path))


def _write(path: Path, values: dict[str, Any]) -> None:
    text = strict_json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
