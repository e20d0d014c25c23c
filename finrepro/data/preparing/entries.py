"""configs/corpora.yaml: the corpora by name, where their text is, and how it is cut into documents
and splits.
"""

from pathlib import Path
from typing import Annotated, Any

import pydantic

from finrepro.catalogue import reader
from finrepro.catalogue.spec import Hub
from finrepro.data import files as data
from finrepro.data.corpora.index import Index, Unfinished
from finrepro.data.preparing.documents import RULES
from finrepro.data.preparing.hub import HubSplit
from finrepro.data.preparing.prepare import Sources
from finrepro.data.preparing.sources import LocalFiles
from finrepro.errors import EnvironmentFault, unknown
from finrepro.settings import Count, build, settings


@settings
class HeldOut:
    """The validation split: this fraction of the documents, by a hash of their text and the
    seed.
    """

    fraction: Annotated[float, pydantic.Field(gt=0, lt=1)]
    seed: Count


@settings
class CorpusEntry:
    """A corpus. Either `files` by split (train, and validation where the text comes with one), or
    `hub` with its `split` and `field`.

    `documents` is the rule that splits text files (finrepro.data.preparing.documents); `held_out`
    is None where validation has a file.
    """

    title: str
    licence: str
    embedded: bool
    documents: str | None = None
    files: dict[str, data.File] | None = None
    hub: Hub | None = None
    split: str = "train"
    field: str = "text"
    held_out: HeldOut | None

    def __post_init__(self) -> None:
        if (self.files is None) == (self.hub is None):
            raise ValueError("needs either 'files' or 'hub'")
        if self.files is not None:
            if self.documents not in RULES:
                raise ValueError(f"'documents' must be one of {', '.join(RULES)}")
            if "train" not in self.files or self.files.keys() > {"train", "validation"}:
                raise ValueError("'files' are 'train' and, where there is one, 'validation'")
            if ("validation" in self.files) == (self.held_out is not None):
                raise ValueError("a validation split is either a file or 'held_out'")


def corpus_entry(name: str) -> CorpusEntry:
    """A checked entry. Raises `UsageError` for an unknown name, with the nearest known one."""
    return build(CorpusEntry, reader.entry("corpora", name, "corpus"), f"corpora.{name}")


def sources_of(name: str, data_dir: Path | None) -> Sources:
    """Where the corpus's documents are read. Raises `EnvironmentFault` when a file is not here,
    or is not the recorded one.
    """
    corpus = corpus_entry(name)
    if corpus.hub is not None:
        return Sources([HubSplit(corpus.hub.id, corpus.hub.revision, corpus.split, corpus.field)])
    assert corpus.files is not None and corpus.documents is not None
    sources: dict[str, list[LocalFiles]] = {"train": [], "validation": []}
    for split, file in corpus.files.items():
        candidates = [
            folder / file.path for folder in (data_dir, data.EMBEDDED) if folder is not None
        ]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            origin = f"; its source is {file.url}" if file.url else ""
            raise EnvironmentFault(
                f"corpus '{name}' is not here: put {file.path} under --data-dir{origin}."
            )
        data.digest_of(data.content_of(path), file, path)
        sources[split].append(LocalFiles(path, corpus.documents, corpus.field))
    return Sources(sources["train"], sources["validation"])


def mismatch(name: str, index: Index | Unfinished) -> str | None:
    """Why a prepared corpus is not the one of this name, None if it is: it was made from another
    repository, revision or file than its entry names.
    """
    corpus, sources = corpus_entry(name), index.source.get("train", [])
    if corpus.hub is not None:
        expected = {
            "hub": corpus.hub.id,
            "revision": corpus.hub.revision,
            "split": corpus.split,
            "field": corpus.field,
        }
        if len(sources) == 1 and expected.items() <= sources[0].items():
            return None
        return (
            f"it is not {name}: it was not made from {corpus.hub.id} at the catalogue's revision "
            "(see `source` in its index.json)"
        )
    file_names = {Path(file.path).name for file in (corpus.files or {}).values()}
    if sources and all(source.get("files", {}).keys() <= file_names for source in sources):
        return None
    return f"it is not {name}: it was made from other files (see `source` in its index.json)"


def named_or_path(
    corpus: str, data_dir: Path | None, **file_options: Any
) -> tuple[Sources, HeldOut | None]:
    """The sources of a catalogue's entry, or of a file or folder; the entry's rule for held-out
    documents, if it has one.

    Raises `UsageError` for a name that is neither.
    """
    if corpus in reader.entries("corpora"):
        return sources_of(corpus, data_dir), corpus_entry(corpus).held_out
    path = Path(corpus).expanduser()
    if not path.exists():
        raise unknown("corpus (or file, or folder)", corpus, reader.entries("corpora"))
    return Sources([LocalFiles(path.absolute(), **file_options)]), None


def listed() -> list[str]:
    """A line for each corpus, for the list of data."""
    lines = []
    for name in reader.entries("corpora"):
        corpus = corpus_entry(name)
        origin = (
            "embedded" if corpus.embedded else "from the hub" if corpus.hub else "under --data-dir"
        )
        lines.append(
            f"{name}: {corpus.title} ({origin}; {corpus.licence}): invoke data --prepare {name}"
        )
    return lines
