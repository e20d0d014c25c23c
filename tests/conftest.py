"""What several test files need: the project, a clean environment, the commands as a user starts them, data that is not embedded."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finrepro import PROJECT, catalogue
from finrepro.errors import FinreproError
from finrepro.run import Place
from finrepro.store import open_store

CACHED = (
    catalogue.catalogue,
    catalogue.model,
    catalogue.adapter,
    catalogue.quantizer,
    catalogue.dataset,
    catalogue.task,
    catalogue.tables,
    catalogue.table,
)


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without the user's own settings: no store, data or token is found by accident, no hub is asked."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FINREPRO_", "HF_", "INVOKE_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"} | extra


def python(*arguments: str, cwd: Path = PROJECT, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter on the project, as a process of its own."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=120)


def one_line(error: FinreproError) -> str:
    """The message of an error, which has to be one readable line."""
    text = str(error)
    assert text.strip() and "\n" not in text and "Traceback" not in text, text
    return text


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty store, with no data and no models beside it."""
    return Place(open_store(tmp_path / "store"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the datasets that may not be embedded."""
    given = os.environ.get("FINREPRO_DATA_DIR")
    if not given or not Path(given).is_dir():
        pytest.skip("data that is not embedded is needed: set FINREPRO_DATA_DIR")
    return Path(given)


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of configs/ that the catalogue reads in place of the project's, to be changed at will (then call `forget`)."""
    folder = tmp_path / "configs"
    shutil.copytree(PROJECT / "configs", folder)
    monkeypatch.setattr(catalogue, "CONFIGS", folder)
    forget()
    yield folder
    monkeypatch.undo()
    forget()


def forget() -> None:
    """Make the catalogue read its files again."""
    for function in CACHED:
        function.cache_clear()


@pytest.fixture(scope="module")
def invoke(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`invoke(*arguments)`: a command as a user types it, with an empty store of this test file's own unless --store is given."""
    store = tmp_path_factory.mktemp("commands") / "store"

    def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return python("-m", "invoke", *arguments, **({"FINREPRO_STORE": str(store)} | extra))

    return run
