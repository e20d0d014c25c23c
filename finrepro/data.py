"""Dataset files: where they are found, that their bytes are the recorded ones, and the splits made of them."""

import hashlib
import os
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

import numpy as np

from finrepro.errors import EnvironmentFault
from finrepro.examples import Example, Splits, fingerprint, overlap
from finrepro.schema import Choice, Count, Share, settings

EMBEDDED = Path(str(package_files("finrepro"))) / "embedded"


@settings
class Hub:
    """A place on the hub. `revision` is a commit that `source` was read to give, or None: not pinned."""

    id: str
    revision: str | None
    source: str


@settings
class File:
    """One file of a dataset. `hub_path` may name a member of an archive as `archive.zip!member`."""

    path: str
    hub_path: str
    sha256: str
    rows: int


@settings
class Development:
    """The development split: this fraction of the training rows, drawn with a private generator."""

    fraction: Share
    seed: Count


@dataclass(frozen=True)
class Dataset:
    """The examples of a dataset with the evidence of what they are."""

    splits: Splits
    fingerprints: dict[str, str]
    overlap: dict[str, int]
    origin: dict[str, str]  # file role -> "data directory", "embedded" or "hub"


def locate(dataset: Choice, data_dir: Path | None) -> dict[str, tuple[str, Path]] | None:
    """Where each file of the dataset lies on this machine, without opening it; None if one is missing.

    Order: `data_dir` (the layout `<set>/<file>`), the embedded data, files fetched from the hub before.
    """
    found = {}
    for role, file in dataset.config.files.items():
        places = [("embedded", EMBEDDED / file.path), ("hub", hub_cache() / file.sha256 / Path(file.path).name)]
        if data_dir is not None:
            places.insert(0, ("data directory", data_dir / file.path))
        here = next(((origin, path) for origin, path in places if path.is_file()), None)
        if here is None:
            return None
        found[role] = here
    return found


def missing_reason(dataset: Choice, data_dir: Path | None) -> str | None:
    """Why the dataset cannot be read here, in one line that says what to do; None if it can."""
    if locate(dataset, data_dir) is not None:
        return None
    where = f"not under {data_dir}" if data_dir else "no --data-dir given"
    return (
        f"data '{dataset.name}' is not here ({dataset.config.licence}: not embedded; {where}): "
        f"give --data-dir, or fetch it once with: invoke data --fetch {dataset.name}"
    )


def hub_cache() -> Path:
    """Folder of files fetched from the hub, beside the hub's own cache (`HF_HOME`), one folder a sha256."""
    return Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "finrepro"


def fetch(dataset: Choice) -> list[Path]:
    """Download every file of the dataset from the hub at its revision through `datasets`, checked, into `hub_cache`."""
    import zipfile

    import datasets

    written = []
    hub = dataset.config.hub
    for file in dataset.config.files.values():
        archive, _, member = file.hub_path.partition("!")
        url = f"hf://datasets/{hub.id}@{hub.revision or 'main'}/{archive}"
        try:
            local = Path(datasets.DownloadManager().download(url))
            content = zipfile.ZipFile(local).read(member) if member else local.read_bytes()
        except Exception as error:  # the hub's client and its transport raise errors that they do not export
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise EnvironmentFault(f"could not fetch {url}: {reason}") from None
        check_digest(content, file, url)
        target = hub_cache() / file.sha256 / Path(file.path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(target)
        written.append(target)
    return written


def check_digest(content: bytes, file: File, where: object) -> None:
    """Raise `EnvironmentFault` unless `content` is the file that was recorded."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise EnvironmentFault(
            f"{where}: sha256 is {digest[:12]}..., expected {file.sha256[:12]}... ({len(content)} bytes): "
            "the file is corrupted, truncated or another version."
        )


def load(dataset: Choice, data_dir: Path | None) -> Dataset:
    """Read, check and split a dataset. Raises `EnvironmentFault` when a file is missing or not the recorded one."""
    places = locate(dataset, data_dir)
    if places is None:
        raise EnvironmentFault(str(missing_reason(dataset, data_dir)))
    contents = {}
    for role, (_, path) in places.items():
        try:
            contents[role] = path.read_bytes()
        except OSError as error:
            raise EnvironmentFault(f"{path}: {error.strerror}.") from None
        check_digest(contents[role], dataset.config.files[role], path)
    splits = dataset.module("datasets").read(contents, dataset.name, dataset.config)
    splits = cut_development(splits, dataset.config.development)
    return Dataset(
        splits=splits,
        fingerprints={name: fingerprint(examples) for name, examples in splits.items()},
        overlap=overlap(splits),
        origin={role: origin for role, (origin, _) in places.items()},
    )


def cut_development(splits: Splits, rule: Development) -> Splits:
    """Move a random part of the training rows to a development split; both keep the file's order."""
    train = splits["train"]
    order = np.random.default_rng(rule.seed).permutation(len(train))
    chosen = set(order[: round(len(train) * rule.fraction)].tolist())
    kept: tuple[Example, ...] = tuple(example for row, example in enumerate(train) if row not in chosen)
    held: tuple[Example, ...] = tuple(example for row, example in enumerate(train) if row in chosen)
    return {"train": kept, "development": held, **{name: rows for name, rows in splits.items() if name != "train"}}
