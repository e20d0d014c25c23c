"""The folder of a prepared corpus, `corpora/NAME` in the data directory, and the tokenizer beside
its shards; which corpus a task is trained on.
"""

import shutil
from pathlib import Path

from finrepro import strict_json
from finrepro.catalogue.spec import TaskSpec
from finrepro.data.corpora.index import INDEX
from finrepro.data.tokenizer_files import CONFIG, FILES, GPT2, is_bare_gpt2, tokenizer_digest
from finrepro.evidence.files import new_folder

TOKENIZER = "tokenizer"


def is_running_text(task: TaskSpec) -> bool:
    """Whether a task is trained on in windows."""
    return bool(getattr(task.task.config, "windows", False))


def corpus_of(task: TaskSpec) -> str | None:
    """The prepared corpus that a task is trained on, None where that is its dataset."""
    name: str | None = getattr(task.task.config, "corpus", None)
    return name


def block_of(task: TaskSpec) -> int | None:
    """How many consecutive windows are permuted among themselves where a corpus is read while it
    is prepared; None where all of them are.
    """
    return getattr(task.task.config, "block", None)


def folder_of(name: str, data_dir: Path | None) -> Path | None:
    """The folder of a corpus of configs/corpora.yaml, whether or not it is there; None without a
    data directory.
    """
    return data_dir / "corpora" / name if data_dir is not None else None


def unprepared_reason(name: str, data_dir: Path | None) -> str | None:
    """Why the corpus cannot be trained on, in one line that says what to do; None if it can."""
    folder = folder_of(name, data_dir)
    if folder is not None and (folder / INDEX).is_file():
        return None
    where = f"corpora/{name} of a --data-dir, and give --data-dir" if folder is None else folder
    return (
        f"corpus '{name}' is not prepared: "
        f"invoke data --prepare {name} --tokenizer FOLDER --out {where}"
    )


def copy_tokenizer(source: Path, corpus: Path) -> None:
    """Copy the tokenizer's files beside a corpus' shards, all or none: a model trained on them
    needs the tokenizer that made them. The same tokenizer is not copied again.

    GPT-2's release is two files that no library recognizes by themselves; it gets a
    `tokenizer_config.json`.
    """
    target = corpus / TOKENIZER
    # Readers of the shards may be reading the copy that is there.
    if target.is_dir() and tokenizer_digest(target) == tokenizer_digest(source):
        return
    with new_folder(target) as folder:
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if is_bare_gpt2(folder):
            (folder / CONFIG).write_text(strict_json.dumps(GPT2), encoding="utf-8")
