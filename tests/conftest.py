"""Fixtures of several test files: an empty store, data that is not embedded, configurations to
change, the commands.
"""

import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is loaded: its threads are to sleep while they wait. Spinning, a busy machine runs
# the tests many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Where CI is set, pytest writes out whole differences. Planted mutants differ in thousands of
# numbers: that took hours.
os.environ.pop("CI", None)
os.environ.pop("BUILD_NUMBER", None)
# Programs of the tests run as processes of their own, and import what the tests do.
ROOT = Path(__file__).parent.parent
PYTEST = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in PYTEST["pythonpath"])

import fixtures.annotations  # noqa: F401  (first: what it does is done to what is imported after it)
import pytest
from fixtures.process import forget, python

from finrepro import PROJECT
from finrepro.catalogue import reader
from finrepro.evidence.place import Place
from finrepro.evidence.store import open_store


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
    """A copy of configs/ that the catalogue reads in place of the project's, to be changed at
    will (then call `forget`).
    """
    folder = tmp_path / "configs"
    shutil.copytree(PROJECT / "configs", folder)
    monkeypatch.setattr(reader, "CONFIGS", folder)
    forget()
    yield folder
    monkeypatch.undo()
    forget()


@pytest.fixture(scope="module")
def invoke(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`invoke(*arguments)`: a command as a user types it, with an empty store of this test
    file's own unless --store is given.
    """
    store = tmp_path_factory.mktemp("commands") / "store"

    def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return python("-m", "invoke", *arguments, **({"FINREPRO_STORE": str(store)} | extra))

    return run
