"""The list of datasets for a terminal: title, sources, which files are on this machine, and the
command that fetches the missing ones.
"""

import textwrap
from pathlib import Path
from urllib.parse import urlsplit

from finrepro.catalogue import reader
from finrepro.data import files
from finrepro.data.files import File
from finrepro.settings import Choice

WIDTH = 100


def datasets(data_dir: Path | None) -> list[str]:
    """Lines for every dataset of the catalogue, none longer than `WIDTH` unless a single word
    is.
    """
    lines: list[str] = []
    for name in reader.entries("datasets"):
        lines += [*_description(reader.dataset(name), data_dir), ""]
    return lines[:-1]


def _description(dataset: Choice, data_dir: Path | None) -> list[str]:
    config = dataset.config
    tasks = [
        name
        for name, task in reader.entries("tasks").items()
        if task.get("dataset") == dataset.name
    ]
    lines = textwrap.wrap(
        f"{dataset.name}: {config.title}", WIDTH, subsequent_indent="  ", break_on_hyphens=False
    )
    lines += _field("licence", config.licence + ("" if config.embedded else "; not embedded"))
    for number, source in enumerate(sources(dataset)):
        lines += _field("" if number else "source", source)
    for role, file in config.files.items():
        lines += _field(role, f"{where(dataset, role, data_dir)}, {_pinned(file)}")
    lines += _field("tasks", ", ".join(tasks) or "none")
    missing = [role for role in config.files if files.find(dataset, role, data_dir) is None]
    if missing:
        paths = ", ".join(config.files[role].path for role in missing)
        step = (
            f"invoke data --fetch {dataset.name}"
            if can_fetch(dataset, missing)
            else "nobody offers it to fetch"
        )
        lines += _field("to get it", f"{step} (or put {paths} under --data-dir)")
    return lines


def sources(dataset: Choice) -> list[str]:
    """Where the files come from: a hub dataset with its revision, repositories with commits."""
    config, names = dataset.config, []
    if config.hub:
        revision = f"@{config.hub.revision}" if config.hub.revision else ", revision not pinned"
        names.append(f"hub {config.hub.id}{revision}")
    names += [_repository(file.url) for file in config.files.values() if file.url]
    return list(dict.fromkeys(names))


def _repository(url: str) -> str:
    """`owner/name@commit` of a raw file at GitHub, else the host."""
    address = urlsplit(url)
    owner, name, commit, *_ = [*address.path.strip("/").split("/"), "", "", ""]
    if address.netloc == "raw.githubusercontent.com":
        return f"{owner}/{name}@{commit}"
    return address.netloc


def where(dataset: Choice, role: str, data_dir: Path | None) -> str:
    """Where a file is on this machine, in words."""
    location = files.find(dataset, role, data_dir)
    return f"here ({location[0]})" if location else "not here"


def can_fetch(dataset: Choice, roles: list[str]) -> bool:
    """Whether every one of the files has an address."""
    return all(dataset.config.files[role].url or dataset.config.hub for role in roles)


def _pinned(file: File) -> str:
    rows = f"{file.rows:,} rows" if file.rows else "rows not known"
    return f"{rows}, sha256 {file.sha256[:12]}..." if file.sha256 else f"{rows}, sha256 not pinned"


def _field(name: str, text: str) -> list[str]:
    """`name: text`, folded under itself."""
    head = f"  {name + ':' if name else '':<11}"
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
