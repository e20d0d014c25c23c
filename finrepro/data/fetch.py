"""Download the files of a dataset, each from the one place that its entry names, and keep them
where `finrepro.data.files` finds them.
"""

import logging
import math
import zipfile
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from finrepro import bounds, strict_json
from finrepro.data.files import digest_of, fetched_path
from finrepro.data.hub_client import reason_of
from finrepro.errors import EnvironmentFault
from finrepro.evidence.files import write_bytes
from finrepro.settings import Choice

TIMEOUT = 60.0  # seconds without an answer


def fetch(dataset: Choice) -> list[Path]:
    """Download every file of the dataset, checked; the paths in the order of its files.

    One file that cannot be had does not keep the others from being fetched. Raises
    `EnvironmentFault` with the first reason.
    """
    written, reasons = [], []
    for role, file in dataset.config.files.items():
        try:
            content = download(dataset, role)
            digest_of(content, file, address(dataset, role))
            written.append(_write(content, fetched_path(dataset, role)))
        except EnvironmentFault as error:
            reasons.append(str(error))
    if reasons:
        count = f" ({len(written)} of {len(dataset.config.files)} files are here now)"
        raise EnvironmentFault(reasons[0] + (count if written else ""))
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
    where, file = address(dataset, role), dataset.config.files[role]
    try:
        if file.url:
            return _by_url(file.url)
        if file.hub_path:
            return _hub_file(dataset, file.hub_path)
        return _hub_split(dataset, role)
    except ImportError as error:
        raise EnvironmentFault(
            f"could not fetch {where}: the package '{error.name}' is not installed."
        ) from None
    # The hub's client and its transport raise errors that they do not export.
    except Exception as error:
        raise EnvironmentFault(f"could not fetch {where}: {reason_of(error)}") from None


def _by_url(url: str) -> bytes:
    if not url.startswith("https://"):
        raise ValueError("not an https address")
    try:
        with urlopen(Request(url, headers={"User-Agent": "finrepro"}), timeout=TIMEOUT) as answer:
            return bytes(answer.read())
    except HTTPError:
        raise
    except URLError as error:
        raise OSError(str(error.reason)) from None  # without urllib's own brackets


def _hub_file(dataset: Choice, path: str) -> bytes:
    """A file of a dataset's repository on the hub; `archive.zip!member` is a member of one."""
    import huggingface_hub

    _quiet_client()
    hub = dataset.config.hub
    archive, _, member = path.partition("!")
    downloaded = huggingface_hub.hf_hub_download(
        hub.id, archive, repo_type="dataset", revision=hub.revision
    )
    content = Path(downloaded).read_bytes()
    return bounds.unpack(zipfile.ZipFile(BytesIO(content)), member) if member else content


def _hub_split(dataset: Choice, role: str) -> bytes:
    """A split that only the hub's library can name, as JSON lines."""
    import datasets

    _quiet_client()
    hub = dataset.config.hub
    rows = datasets.load_dataset(hub.id, revision=hub.revision, split=role)
    # A missing number is NaN in the library's rows and null in JSON; the format's reader names it
    # where a text is missing.
    rows = (
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        for row in rows
    )
    lines = (strict_json.dumps(dict(row), ensure_ascii=False, default=str) + "\n" for row in rows)
    return "".join(lines).encode()


def _quiet_client() -> None:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry


def _write(content: bytes, target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, content)
    except OSError as error:
        raise EnvironmentFault(
            f"could not write {target}: {error.strerror} (the folder is HF_HOME)."
        ) from None
    return target
