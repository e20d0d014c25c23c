"""Where a prepared corpus lies for training, `corpora/NAME` in the data directory, and the
tokenizer that is kept with it.
"""

import json
import shutil
from pathlib import Path

from finrepro.catalogue.spec import TaskSpec
from finrepro.data.corpora.index import INDEX
from finrepro.data.tokens import tokenizer_digest

TOKENIZER = "tokenizer"
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
GPT2 = {
    "tokenizer_class": "GPT2TokenizerFast",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
}


def is_running_text(task: TaskSpec) -> bool:
    """Whether a task is trained on in windows."""
    return bool(getattr(task.task.config, "windows", False))


def corpus_of(task: TaskSpec) -> str | None:
    """The prepared corpus that a task is trained on, None where that is its dataset."""
    name: str | None = getattr(task.task.config, "corpus", None)
    return name


def block_of(task: TaskSpec) -> int | None:
    """How many windows are permuted among themselves where a corpus is read as it arrives; None
    where all of it is.
    """
    return getattr(task.task.config, "block", None)


def folder_of(name: str, data_dir: Path | None) -> Path | None:
    """The folder of a corpus of configs/corpora.yaml, whether or not it is there; None without a
    data directory.
    """
    return data_dir / "corpora" / name if data_dir is not None else None


def missing_reason(name: str, data_dir: Path | None) -> str | None:
    """Why the corpus cannot be trained on here, in one line that says what to do; None if it
    can.
    """
    folder = folder_of(name, data_dir)
    if folder is not None and (folder / INDEX).is_file():
        return None
    where = f"{folder}" if folder is not None else "corpora/" + name + " of a --data-dir"
    return (
        f"corpus '{name}' is not prepared: invoke data --prepare {name} --tokenizer FOLDER --out {where}"
        f"{'' if folder is not None else ', and give --data-dir'}"
    )


def keep_tokenizer(given: Path, folder: Path) -> None:
    """Copy the tokenizer's files beside the shards, whole or not at all: what was trained on them
    needs it. One that is there stays.

    GPT-2's release is two files that no library recognizes by themselves; it gets a note of what
    they are.
    """
    partial, goal = folder / f".{TOKENIZER}.partial", folder / TOKENIZER
    # Those who follow the shards may be reading the one that is there.
    if goal.is_dir() and tokenizer_digest(goal) == tokenizer_digest(given):
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in FILES:
        if (given / name).is_file():
            shutil.copyfile(given / name, partial / name)
    if (
        not (partial / "tokenizer.json").is_file()
        and not (partial / "tokenizer_config.json").is_file()
    ):
        (partial / "tokenizer_config.json").write_text(json.dumps(GPT2), encoding="utf-8")
    shutil.rmtree(goal, ignore_errors=True)
    partial.replace(goal)
