"""An installed package: it holds what a checkout has, and its command works in any folder."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from fixtures.process import environment

from finrepro import PROJECT
from finrepro.evidence import provenance

BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS = ("finrepro", "configs", "requirements")


def test_the_build_takes_the_locked_setuptools():
    build = tomllib.loads((PROJECT / "pyproject.toml").read_text())["build-system"]
    for lock in ("cpu.lock", "cuda.lock"):
        text = (PROJECT / "requirements" / lock).read_text()
        (locked,) = re.findall(r"^(setuptools==\S+)", text, re.MULTILINE)
        assert build["requires"] == [locked]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy of the sources."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(
            PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for name in BUILT_FROM:
        shutil.copy(PROJECT / name, source)
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(source))
    (path,) = folder.glob("finrepro-*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    answer = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def call(
    site: Path, *arguments: str, cwd: Path, **extra: str
) -> "subprocess.CompletedProcess[str]":
    """Run the interpreter where the installed package, and nothing of the checkout, is found."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(PYTHONPATH=str(site)) | extra,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_the_wheel_holds_the_sources_the_configurations_the_data_and_the_locks(wheel: Path):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(PROJECT).as_posix()
        for path in (PROJECT / "finrepro").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {
        f"finrepro/{path.relative_to(PROJECT).as_posix()}"
        for path in [*(PROJECT / "configs").rglob("*"), *(PROJECT / "requirements").glob("*.lock")]
        if path.is_file()
    }
    assert held == expected


@pytest.mark.slow
def test_the_command_works_in_any_folder_and_leaves_results_there(site: Path, tmp_path: Path):
    finrepro = str(site / "bin" / "finrepro")
    listed = call(site, finrepro, "--list", cwd=tmp_path)
    assert listed.returncode == 0 and re.search(r"^ +reproduce\b", listed.stdout, re.MULTILINE)
    cells = call(site, finrepro, "cells", "--scale", "smoke", cwd=tmp_path)
    assert cells.returncode == 0 and "gpt2_127m_mini-none-full-tfns-s0" in cells.stdout
    table = call(site, finrepro, "reproduce", "--table", "1", cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    assert (tmp_path / "results" / "tables" / "paper" / "table1.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"results"}
    wrong = call(site, finrepro, "cells", "--scale", "smok", cwd=tmp_path)
    assert wrong.returncode == 2 and "Did you mean 'smoke'?" in wrong.stderr
    assert call(site, finrepro, "cells", "--colour", cwd=tmp_path).returncode == 1
    test = call(site, finrepro, "test", cwd=tmp_path)
    assert test.returncode == 3 and "clone of the repository" in test.stderr


@pytest.mark.slow
def test_an_installed_package_makes_what_the_checkout_makes(site: Path, tmp_path: Path):
    """A cell of it has the source and the lock of a cell of ours, and runs in its own process."""
    program = (
        "import finrepro; from finrepro.evidence import provenance; "
        "print(finrepro.PROJECT, provenance.source_digest(), provenance.lock_digest())"
    )
    lock = "requirements/cpu.lock"
    answer = call(site, "-c", program, cwd=tmp_path, FINREPRO_LOCK=lock)
    digest = provenance.hashlib.sha256((PROJECT / lock).read_bytes()).hexdigest()
    assert answer.stdout.split() == [
        str(site / "finrepro"),
        provenance.source_digest(),
        digest,
    ], answer.stderr
    cell = ("--scale", "smoke", "--weights", "random", "--only", "gpt2_127m_mini-none-base-tfns-s0")
    run = call(
        site, str(site / "bin" / "finrepro"), "reproduce", "--table", "3", *cell, cwd=tmp_path
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "MLflow: finrepro ui" in run.stdout
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 1
