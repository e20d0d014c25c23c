"""The texts and the bare tokenizer that benchmarks of the data engine share."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _measure import DRY, sized

from finrepro.data.preparing.entries import sources_of
from finrepro.data.preparing.sources import LocalFiles
from finrepro.data.tokens import train_tokenizer

VOCABULARY, DRY_BYTES = sized(8192, 300), 1 << 14


def data_dir() -> Path | None:
    """FINREPRO_DATA_DIR, which a dry run does without."""
    path = sized(os.environ.get("FINREPRO_DATA_DIR"), None)
    return Path(path) if path else None


def paragraphs(folder: Path) -> list[LocalFiles]:
    """WikiText-2's files, both splits, a paragraph a document; in a dry run their beginnings,
    written to `folder`.
    """
    entry = sources_of("wikitext2", None)
    paths = [
        source.path
        for source in (*entry.train, *entry.validation)
        if isinstance(source, LocalFiles)
    ]
    return [LocalFiles(_beginning(path, folder) if DRY else path, "paragraphs") for path in paths]


def texts_of(sources: Iterable[LocalFiles]) -> list[str]:
    """Every document's text. Raises `AssertionError` at a damaged one."""

    def fault(name: str, line: int, message: str) -> None:
        raise AssertionError(f"{name}, line {line}: {message}")

    return [document.text for source in sources for _, document in source.read(fault)]


def gpt2_tokenizer(folder: Path, texts: list[str]) -> Path:
    """The folder of GPT-2's tokenizer where FINREPRO_DATA_DIR has it, else of one trained on
    `texts` and saved under `folder`.
    """
    path = (data_dir() or folder) / "gpt2_tokenizer"
    if not path.is_dir():
        train_tokenizer(texts, "gpt2", VOCABULARY).save_pretrained(path)
    return path


def bare(folder: Path) -> Any:
    """The tokenizer as Transformers gives it."""
    import transformers

    if (folder / "tokenizer.json").is_file():
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return transformers.GPT2TokenizerFast.from_pretrained(folder, local_files_only=True)


def _beginning(path: Path, folder: Path) -> Path:
    lines = path.read_bytes()[:DRY_BYTES].rsplit(b"\n", 1)[0]
    beginning = folder / path.name
    beginning.write_bytes(lines + b"\n")
    return beginning
