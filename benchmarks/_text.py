"""The text and the bare tokenizer that benchmarks of the data engine share."""

from pathlib import Path
from typing import Any

from finrepro.data.preparing.entries import sources_of
from finrepro.data.preparing.sources import LocalFiles


def paragraphs() -> list[LocalFiles]:
    """WikiText-2's files, both splits, a paragraph a document."""
    entry = sources_of("wikitext2", None)
    return [LocalFiles(each.path, "paragraphs") for each in (*entry.train, *entry.validation)]  # type: ignore[union-attr]


def bare(folder: Path) -> Any:
    """The tokenizer as Transformers gives it."""
    import transformers

    if (folder / "tokenizer.json").is_file():
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return transformers.GPT2TokenizerFast.from_pretrained(folder, local_files_only=True)
