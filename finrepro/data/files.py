"""Dataset files: where they are found, that their bytes are the recorded ones, and the splits
made of them.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Literal

import numpy as np

from finrepro.data import hub_client
from finrepro.data.examples import Example, Splits, fingerprint, overlap
from finrepro.errors import EnvironmentFault
from finrepro.kinds import format_of
from finrepro.settings import Choice, Count, Share, settings

EMBEDDED = Path(str(package_files("finrepro.data"))) / "embedded"


@settings
class File:
    """One file of a dataset, and the one place that it is fetched from: `url`, else `hub_path`,
    else the hub's split of the role's name.

    `hub_path` may name a member of an archive as `archive.zip!member`. `sha256` and `rows` are None
    where nobody who could be read states them: such a file is used as it is, and a result records
    the sha256 that was seen.
    """

    path: str
    hub_path: str | None = None
    url: str | None = None
    sha256: str | None
    rows: int | None


@settings
class Development:
    """The development split: this fraction of the training rows, drawn with a private generator.

    `unit` is what is drawn: rows, texts with all their rows, or whole sources (as
    `Example.source`), until the fraction is reached.
    """

    fraction: Share
    seed: Count
    unit: Literal["row", "text", "source"] = "row"


@dataclass(frozen=True)
class Dataset:
    """The examples of a dataset with the evidence of what they are. `origin` and `files` are by
    file role.
    """

    splits: Splits
    fingerprints: dict[str, str]
    overlap: dict[str, int]
    origin: dict[str, str]  # "data directory", "embedded" or "fetched"
    files: dict[str, str]  # sha256 of the bytes that were read


def roles(dataset: Choice, splits: Sequence[str] | None = None) -> tuple[str, ...]:
    """The files that the splits are made of (None: every file). The development split is a part
    of the training split.
    """
    config = dataset.config
    if splits is None:
        return tuple(config.files)
    needed = format_of(dataset).needed
    named = ["train" if split == "development" else split for split in splits]
    return tuple(dict.fromkeys(role for split in named for role in needed(split)))


def fetched_path(dataset: Choice, role: str) -> Path:
    """Where a fetched file lies: in a folder named after its sha256, or after its dataset where
    that is not known.
    """
    file = dataset.config.files[role]
    return fetched_folder() / (file.sha256 or f"unpinned-{dataset.name}") / Path(file.path).name


def find(dataset: Choice, role: str, data_dir: Path | None) -> tuple[str, Path] | None:
    """(origin, path) of one file on this machine, without opening it; None if it is not here.

    Order: `data_dir` (the layout `<set>/<file>`), the embedded data, files fetched before.
    """
    file = dataset.config.files[role]
    places = [("embedded", EMBEDDED / file.path), ("fetched", fetched_path(dataset, role))]
    if data_dir is not None:
        places.insert(0, ("data directory", data_dir / file.path))
    return next(((origin, path) for origin, path in places if path.is_file()), None)


def locate(
    dataset: Choice, data_dir: Path | None, splits: Sequence[str] | None = None
) -> dict[str, tuple[str, Path]] | None:
    """Where each file that the splits need (None: every file) lies on this machine; None if one
    of them is missing.
    """
    found = {role: find(dataset, role, data_dir) for role in roles(dataset, splits)}
    here = {role: place for role, place in found.items() if place is not None}
    return here if len(here) == len(found) else None


def dataset_missing_reason(
    dataset: Choice, data_dir: Path | None, splits: Sequence[str] | None = None
) -> str | None:
    """Why the splits (None: all of them) cannot be read here, in one line that says what to do;
    None if they can.
    """
    needed = roles(dataset, splits)
    missing = [role for role in needed if find(dataset, role, data_dir) is None]
    if not missing:
        return None
    config = dataset.config
    names = ", ".join(config.files[role].path for role in missing)
    what = "is not here" if len(missing) == len(config.files) else f"lacks {names}"
    whose = (
        f" for its {' and '.join(splits)} split{'s' if len(splits) > 1 else ''}" if splits else ""
    )
    where = "not under --data-dir" if data_dir else "no --data-dir given"
    return (
        f"data '{dataset.name}' {what}{whose} ({config.licence}: not embedded; {where}): "
        f"give --data-dir, or fetch it once with: invoke data --fetch {dataset.name}"
    )


def fetched_folder() -> Path:
    """Folder of fetched files, beside the hub's own cache (`HF_HOME`)."""
    return hub_client.home() / "finrepro"


def digest_of(content: bytes, file: File, where: object) -> str:
    """The sha256 of `content`. Raises `EnvironmentFault` unless it is the recorded one, where
    one is recorded.
    """
    digest = hashlib.sha256(content).hexdigest()
    if file.sha256 is not None and digest != file.sha256:
        raise EnvironmentFault(
            f"{where}: sha256 is {digest[:12]}..., expected {file.sha256[:12]}... ({len(content)} bytes): "
            "the file is corrupted, truncated or another version."
        )
    return digest


def check_rows(name: str, role: str, file: File, rows: int, what: str = "rows") -> None:
    """Raise `EnvironmentFault` unless the file has as many rows as its publisher states, where
    that is recorded.
    """
    if file.rows is not None and rows != file.rows:
        raise EnvironmentFault(
            f"dataset '{name}', file '{role}': {rows} {what}, expected {file.rows}."
        )


def load(dataset: Choice, data_dir: Path | None, splits: Sequence[str] | None = None) -> Dataset:
    """Read, check and split a dataset: the named splits, read from no other files than they need,
    or all (None).

    Raises `EnvironmentFault` when a file is missing or not the recorded one.
    """
    places = locate(dataset, data_dir, splits)
    if places is None:
        raise EnvironmentFault(str(dataset_missing_reason(dataset, data_dir, splits)))
    contents, digests = {}, {}
    for role, (_, path) in places.items():
        try:
            contents[role] = path.read_bytes()
        except OSError as error:
            raise EnvironmentFault(f"{path}: {error.strerror}.") from None
        digests[role] = digest_of(contents[role], dataset.config.files[role], path)
    made = cut_development(
        format_of(dataset).read(contents, dataset.name),
        dataset.config.development,
    )
    made = {name: rows for name, rows in made.items() if splits is None or name in splits}
    return Dataset(
        splits=made,
        fingerprints={name: fingerprint(examples) for name, examples in made.items()},
        overlap=overlap(made),
        origin={role: origin for role, (origin, _) in places.items()},
        files=digests,
    )


def cut_development(splits: Splits, rule: Development) -> Splits:
    """Move a random part of the training rows to a development split; both keep the file's
    order.
    """
    if "train" not in splits:
        return splits
    train = splits["train"]
    keys = {
        "row": [example.id for example in train],
        "text": [example.text for example in train],
        "source": [example.source for example in train],
    }[rule.unit]
    sizes = Counter(keys)  # in the order of the file
    units = list(sizes)
    chosen: set[str] = set()
    count = 0
    for unit in np.random.default_rng(rule.seed).permutation(len(units)).tolist():
        if count >= round(len(train) * rule.fraction):
            break
        chosen.add(units[unit])
        count += sizes[units[unit]]
    kept: tuple[Example, ...] = tuple(
        example for key, example in zip(keys, train, strict=True) if key not in chosen
    )
    held: tuple[Example, ...] = tuple(
        example for key, example in zip(keys, train, strict=True) if key in chosen
    )
    return {
        "train": kept,
        "development": held,
        **{name: rows for name, rows in splits.items() if name != "train"},
    }
