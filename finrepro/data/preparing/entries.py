"""configs/corpora.yaml: corpora that are known by name, where their text is and how it is cut
into documents and splits.
"""

from pathlib import Path
from typing import Annotated, Any

import pydantic

from finrepro.catalogue import reader
from finrepro.catalogue.spec import Hub
from finrepro.data import files as data
from finrepro.data.corpora.index import Begun, Index
from finrepro.data.preparing import hub
from finrepro.data.preparing.documents import RULES
from finrepro.data.preparing.prepare import Sources
from finrepro.data.preparing.sources import Local
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
class Entry:
    """A corpus. Either `files` by split (train, and validation where the text comes with one), or
    `hub` with its split and field.

    `documents` is the rule that cuts text files (finrepro.data.preparing.documents); `held_out` is
    None where validation has files of its own.
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


def entry(name: str) -> Entry:
    """A checked entry. Raises `UsageError` naming the known ones."""
    return build(Entry, reader.entry("corpora", name, "corpus"), f"corpora.{name}")


def sources_of(name: str, data_dir: Path | None) -> Sources:
    """Where the corpus's documents are read. Raises `EnvironmentFault` when a file is not here,
    or is not the recorded one.
    """
    found = entry(name)
    if found.hub is not None:
        return Sources([hub.Hub(found.hub.id, found.hub.revision, found.split, found.field)])
    assert found.files is not None and found.documents is not None
    places: dict[str, list[Local]] = {"train": [], "validation": []}
    for split, file in found.files.items():
        candidates = [
            folder / file.path for folder in (data_dir, data.EMBEDDED) if folder is not None
        ]
        path = next((each for each in candidates if each.is_file()), None)
        if path is None:
            source = f"; its source is {file.url}" if file.url else ""
            raise EnvironmentFault(
                f"corpus '{name}' is not here: put {file.path} under --data-dir{source}."
            )
        try:
            data.digest_of(path.read_bytes(), file, path)
        except OSError as error:
            raise EnvironmentFault(f"{path}: {error.strerror}.") from None
        places[split].append(Local(path, found.documents, found.field))
    return Sources(places["train"], places["validation"])


def unlike(name: str, index: Index | Begun) -> str | None:
    """Why a prepared corpus is not the one of this name, None if it is: made from another place,
    revision or file than its entry says.
    """
    found, made = entry(name), index.source.get("train", [])
    if found.hub is not None:
        wanted = {
            "hub": found.hub.id,
            "revision": found.hub.revision,
            "split": found.split,
            "field": found.field,
        }
        if len(made) == 1 and wanted.items() <= made[0].items():
            return None
        return f"it is not {name}: it was not made from {found.hub.id} at the catalogue's revision (see `source` in its index.json)"
    wanted_files = {Path(file.path).name for file in (found.files or {}).values()}
    if all(each.get("files", {}).keys() <= wanted_files for each in made) and made:
        return None
    return f"it is not {name}: it was made from other files (see `source` in its index.json)"


def named_or_path(
    given: str, data_dir: Path | None, **local: Any
) -> tuple[Sources, HeldOut | None]:
    """The sources of a catalogue's entry, or of a file or folder; the entry's rule for held-out
    documents, if it has one.

    Raises `UsageError` for what is neither.
    """
    if given in reader.entries("corpora"):
        return sources_of(given, data_dir), entry(given).held_out
    path = Path(given).expanduser()
    if not path.exists():
        raise unknown("corpus (or file, or folder)", given, reader.entries("corpora"))
    return Sources([Local(path.absolute(), **local)]), None


def listed() -> list[str]:
    """A line for each corpus, for the list of data."""
    lines = []
    for name in reader.entries("corpora"):
        found = entry(name)
        place = (
            "embedded" if found.embedded else "from the hub" if found.hub else "under --data-dir"
        )
        lines.append(
            f"{name}: {found.title} ({place}; {found.licence}): invoke data --prepare {name}"
        )
    return lines
