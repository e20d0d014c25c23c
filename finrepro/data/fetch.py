"""Download the files of a dataset, each from the one place that its entry names, and keep them
where `finrepro.data.files` finds them.
"""

import json
import logging
import os
import re
import zipfile
from io import BytesIO
from pathlib import Path
from urllib.request import Request, urlopen

from finrepro.data.files import File, digest_of, fetched_path
from finrepro.errors import EnvironmentFault
from finrepro.settings import Choice

TIMEOUT = 60.0  # seconds without an answer
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "GITHUB_TOKEN")


def fetch(dataset: Choice) -> list[Path]:
    """Download every file of the dataset, checked; the paths in the order of its files.

    One file that cannot be had does not keep the others from being fetched. Raises
    `EnvironmentFault` with the first reason.
    """
    written, failed = [], []
    for role, file in dataset.config.files.items():
        try:
            content = download(dataset, role)
            digest_of(content, file, address(dataset, role))
            written.append(_keep(content, fetched_path(dataset, role)))
        except EnvironmentFault as error:
            failed.append(str(error))
    if failed:
        others = (
            f" ({len(written)} of {len(dataset.config.files)} files are here now)"
            if written
            else ""
        )
        raise EnvironmentFault(failed[0] + others)
    return written


def address(dataset: Choice, role: str) -> str:
    """Where a file comes from: its URL, its path on the hub, or the hub's dataset and split."""
    file, hub = dataset.config.files[role], dataset.config.hub
    if file.url:
        return str(file.url)
    path = f"/{file.hub_path}" if file.hub_path else f", split {role}"
    return f"hf://datasets/{hub.id}@{hub.revision or 'main'}{path}"


def download(dataset: Choice, role: str) -> bytes:
    """The bytes of one file, unchecked. Raises `EnvironmentFault` in one line, without any
    token.
    """
    where = address(dataset, role)
    file = dataset.config.files[role]
    try:
        return _by_url(file.url) if file.url else _from_hub(dataset, role, file)
    except ImportError as error:
        raise EnvironmentFault(
            f"could not fetch {where}: the package '{error.name}' is not installed."
        ) from None
    except (
        Exception
    ) as error:  # the hub's client and its transport raise errors that they do not export
        raise EnvironmentFault(f"could not fetch {where}: {without_secrets(error)}") from None


def without_secrets(error: Exception) -> str:
    """The first line of an error's text, access tokens and passwords in addresses taken out."""
    lines = str(error).strip().splitlines()
    text = (
        lines[0].removeprefix("<urlopen error ").removesuffix(">")
        if lines
        else type(error).__name__
    )
    for name in TOKENS:
        text = text.replace(os.environ.get(name) or "\0", "***")
    return re.sub(r"//[^/@\s]+@", "//***@", re.sub(r"\bhf_\w+", "hf_***", text))


def _by_url(url: str) -> bytes:
    if not url.startswith("https://"):
        raise ValueError("not an https address")
    with urlopen(Request(url, headers={"User-Agent": "finrepro"}), timeout=TIMEOUT) as answer:
        return bytes(answer.read())


def _from_hub(dataset: Choice, role: str, file: File) -> bytes:
    """A file of the hub's repository (or a member of an archive there), or a split that only its
    library can name, as JSON lines.
    """
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry
    if file.hub_path is None:
        hub = dataset.config.hub
        rows = datasets.load_dataset(hub.id, revision=hub.revision, split=role)
        return "".join(
            json.dumps(dict(row), ensure_ascii=False, default=str) + "\n" for row in rows
        ).encode()
    archive, _, member = address(dataset, role).partition("!")
    local = Path(datasets.DownloadManager().download(archive))
    return (
        zipfile.ZipFile(BytesIO(local.read_bytes())).read(member) if member else local.read_bytes()
    )


def _keep(content: bytes, target: Path) -> Path:
    """Write a file whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(target)
    except OSError as error:
        raise EnvironmentFault(
            f"could not write {target}: {error.strerror} (the folder is HF_HOME)."
        ) from None
    return target
