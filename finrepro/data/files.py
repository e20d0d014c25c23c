"""Dataset files: where they lie, whether their bytes are the recorded ones, and the splits made of
them.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Literal

import numpy as np

from finrepro import bounds
from finrepro.catalogue.spec import Hub
from finrepro.data import hub_client
from finrepro.data.examples import Splits, fingerprint, overlap
from finrepro.errors import EnvironmentFault
from finrepro.kinds import format_of
from finrepro.settings import Choice, Count, Share, settings

EMBEDDED = Path(str(package_files("finrepro.data"))) / "embedded"


@settings
class File:
    """One file of a dataset, and the one place that it is fetched from: `url`, else `hub_path`,
    else the hub's split of the role's name.

    `hub_path` may name a member of an archive as `archive.zip!member`. `sha256` and `rows` are None
    where no source states them: such a file is not checked, and a result records the sha256 of the
    bytes that were read.
    """

    path: str
    hub_path: str | None = None
    url: str | None = None
    sha256: str | None
    rows: int | None


@settings
class Development:
    """The development split: this fraction of the training rows, drawn with a private generator.

    `unit` is what is drawn until the fraction is reached: single rows, texts with all their rows,
    or sources (`Example.source`) with all their rows.
    """

    fraction: Share
    seed: Count
    unit: Literal["row", "text", "source"] = "row"


@settings
class DatasetConfig:
    """What every dataset states, whatever its format; a format adds its own settings.

    `files` are by role: a split's name, unless the format says otherwise. `hub` is the repository
    that files without a `url` come from.
    """

    version: int
    title: str
    licence: str
    embedded: bool
    hub: Hub | None
    files: dict[str, File]
    development: Development


@dataclass(frozen=True)
class Dataset:
    """The examples of a dataset, with fingerprints and overlaps of the splits. `origin` and `files`
    are by file role.
    """

    splits: Splits
    fingerprints: dict[str, str]
    overlap: dict[str, int]
    origin: dict[str, str]  # "data directory", "embedded" or "fetched"
    files: dict[str, str]  # sha256 of the bytes that were read


def roles(dataset: Choice, splits: Sequence[str] | None = None) -> tuple[str, ...]:
    """The roles of the files that the splits are made of (None: every file). The development split
    is cut from the training split.
    """
    config = dataset.config
    if splits is None:
        return tuple(config.files)
    needed_files = format_of(dataset).needed
    read = ["train" if split == "development" else split for split in splits]
    return tuple(dict.fromkeys(role for split in read for role in needed_files(split)))


def fetched_path(dataset: Choice, role: str) -> Path:
    """Where a fetched file lies: in a folder named after its sha256, or after its dataset where no
    sha256 is recorded.
    """
    file = dataset.config.files[role]
    return fetched_folder() / (file.sha256 or f"unpinned-{dataset.name}") / Path(file.path).name


def find(dataset: Choice, role: str, data_dir: Path | None) -> tuple[str, Path] | None:
    """(origin, path) of one file on this machine, without opening it; None if it is absent.

    Searched in order: `data_dir` (layout `<set>/<file>`), the embedded data, the fetched files.
    """
    file = dataset.config.files[role]
    paths = [("embedded", EMBEDDED / file.path), ("fetched", fetched_path(dataset, role))]
    if data_dir is not None:
        paths.insert(0, ("data directory", data_dir / file.path))
    return next(((origin, path) for origin, path in paths if path.is_file()), None)


def locate(
    dataset: Choice, data_dir: Path | None, splits: Sequence[str] | None = None
) -> dict[str, tuple[str, Path]] | None:
    """(origin, path) of each file of the splits (None: every file); None if one is missing."""
    locations = {}
    for role in roles(dataset, splits):
        location = find(dataset, role, data_dir)
        if location is None:
            return None
        locations[role] = location
    return locations


def dataset_missing_reason(
    dataset: Choice, data_dir: Path | None, splits: Sequence[str] | None = None
) -> str | None:
    """Why the splits (None: all of them) cannot be read, in one line that says what to do; None if
    they can.
    """
    missing = [role for role in roles(dataset, splits) if find(dataset, role, data_dir) is None]
    if not missing:
        return None
    config = dataset.config
    names = ", ".join(config.files[role].path for role in missing)
    state = "is not here" if len(missing) == len(config.files) else f"lacks {names}"
    purpose = (
        f" for its {' and '.join(splits)} split{'s' if len(splits) > 1 else ''}" if splits else ""
    )
    where = "not under --data-dir" if data_dir else "no --data-dir given"
    return (
        f"data '{dataset.name}' {state}{purpose} ({config.licence}: not embedded; {where}): "
        f"give --data-dir, or fetch it once with: invoke data --fetch {dataset.name}"
    )


def fetched_folder() -> Path:
    """Folder of fetched files, beside the hub's own cache (`HF_HOME`)."""
    return hub_client.home() / "finrepro"


def content_of(path: Path) -> bytes:
    """The bytes of a data file. Raises `EnvironmentFault` where it cannot be read or is too large
    to be read at once.
    """
    try:
        return bounds.read_bytes(path, bounds.MEMBER_BYTES)
    except OSError as error:
        raise EnvironmentFault(f"{path}: {error.strerror}.") from None
    except bounds.TooLarge as error:
        raise EnvironmentFault(f"{path}: {error}.") from None


def digest_of(content: bytes, file: File, where: object) -> str:
    """The sha256 of `content`. Raises `EnvironmentFault` if another one is recorded."""
    digest = hashlib.sha256(content).hexdigest()
    if file.sha256 is not None and digest != file.sha256:
        raise EnvironmentFault(
            f"{where}: sha256 is {digest[:12]}..., expected {file.sha256[:12]}... "
            f"({len(content)} bytes): the file is corrupted, truncated or another version."
        )
    return digest


def check_rows(name: str, role: str, file: File, rows: int, unit: str = "rows") -> None:
    """Raise `EnvironmentFault` if another number of rows is recorded, as its publisher states it.

    `unit` names them in the message.
    """
    if file.rows is not None and rows != file.rows:
        raise EnvironmentFault(
            f"dataset '{name}', file '{role}': {rows} {unit}, expected {file.rows}."
        )


def load(dataset: Choice, data_dir: Path | None, splits: Sequence[str] | None = None) -> Dataset:
    """Read, check and split a dataset. Only the files of `splits` are read; None: all.

    Raises `EnvironmentFault` when a file is missing or not the recorded one, a row has no text, or
    a split no row.
    """
    locations = locate(dataset, data_dir, splits)
    if locations is None:
        raise EnvironmentFault(str(dataset_missing_reason(dataset, data_dir, splits)))
    contents, digests = {}, {}
    for role, (_, path) in locations.items():
        contents[role] = content_of(path)
        digests[role] = digest_of(contents[role], dataset.config.files[role], path)
    by_split = cut_development(
        format_of(dataset).read(contents, dataset.name),
        dataset.config.development,
    )
    by_split = {
        name: examples for name, examples in by_split.items() if splits is None or name in splits
    }
    for split in splits or ("train", "test"):
        if not by_split.get(split):
            raise EnvironmentFault(
                f"dataset '{dataset.name}': no rows in its {split} split, from "
                f"{', '.join(str(path) for _, path in locations.values())}."
            )
    return Dataset(
        splits=by_split,
        fingerprints={name: fingerprint(examples) for name, examples in by_split.items()},
        overlap=overlap(by_split),
        origin={role: origin for role, (origin, _) in locations.items()},
        files=digests,
    )


def cut_development(splits: Splits, rule: Development) -> Splits:
    """Move a random fraction of the training rows to a development split; both stay in the file's
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
    drawn: set[str] = set()
    count = 0
    for unit in np.random.default_rng(rule.seed).permutation(len(units)).tolist():
        if count >= round(len(train) * rule.fraction):
            break
        drawn.add(units[unit])
        count += sizes[units[unit]]
    keyed = list(zip(keys, train, strict=True))
    return {
        "train": tuple(example for key, example in keyed if key not in drawn),
        "development": tuple(example for key, example in keyed if key in drawn),
        **{name: examples for name, examples in splits.items() if name != "train"},
    }
