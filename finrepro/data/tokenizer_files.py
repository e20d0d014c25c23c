"""The files of a tokenizer, and the digest that stands for all of them.

Version 1 of the digest was of the vocabulary alone, tokenizer.json or what stands for it. Special
tokens, prefix spaces and lower case are also set in tokenizer_config.json: version 2 is over all
files, and begins with "2:". What was recorded in version 1 is compared in version 1.
"""

import hashlib
from pathlib import Path
from typing import Literal

from finrepro import bounds, strict_json
from finrepro.errors import EnvironmentFault

VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
CONFIG = "tokenizer_config.json"
FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    CONFIG,
    "vocab.json",
)
# GPT-2's release is vocab.json and merges.txt alone, from which no library can tell what they are.
GPT2 = {
    "tokenizer_class": "GPT2TokenizerFast",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
}
# Of the settings those that change no token id: prompts are written by tasks, and cut by us.
NOT_TOKENIZING = (
    "chat_template",
    "model_max_length",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "transformers_version",
)
Version = Literal[1, 2]


def tokenizer_digest(folder: Path, version: Version = 2) -> str | None:
    """The digest of the tokenizer in `folder`; None if there is none."""
    vocabulary = next(
        (names for names in VOCABULARIES if all((folder / name).is_file() for name in names)), None
    )
    if vocabulary is None:
        return None
    if version == 1:
        content = b"".join((folder / name).read_bytes() for name in vocabulary)
        return hashlib.sha256(content).hexdigest()
    contents = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if is_bare_gpt2(folder):
        contents[CONFIG] = strict_json.dumps(GPT2).encode()
    if CONFIG in contents:
        contents[CONFIG] = _settings(contents[CONFIG])
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in sorted(contents)]
    return f"2:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def check_bounds(folder: Path) -> None:
    """Raise `EnvironmentFault` for a JSON file of the tokenizer in `folder`, or the configuration
    beside it, that is too large or too deep for the libraries that read it.
    """
    for name in (*FILES, "config.json"):
        path = folder / name
        if path.suffix == ".json" and path.is_file():
            try:
                bounds.check_json(path)
            except (OSError, ValueError) as error:
                raise EnvironmentFault(f"{path}: {error}.") from None


def version_of(digest: str) -> Version:
    """The version of a recorded digest."""
    return 2 if digest.startswith("2:") else 1


def is_bare_gpt2(folder: Path) -> bool:
    """Whether the tokenizer is vocab.json and merges.txt with nothing that says what they are."""
    return not any((folder / name).is_file() for name in ("tokenizer.json", CONFIG)) and all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def _settings(content: bytes) -> bytes:
    """The settings that change token ids, however they are written."""
    try:
        values = bounds.loads(content)
    except ValueError:
        return content
    if not isinstance(values, dict):
        return content
    kept = {key: value for key, value in values.items() if key not in NOT_TOKENIZING}
    return strict_json.dumps(kept, sort_keys=True).encode()
