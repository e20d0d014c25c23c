"""Law: the packages that the paper names are those that run: without one, what needs it fails by
its name, not passes another way.
"""

import json
from pathlib import Path

import pytest
from fixtures.process import python

from finrepro.errors import CellFailed, EnvironmentFault
from finrepro.evidence.store import FAILED, open_store

pytestmark = pytest.mark.slow

# a few steps, not scored: adapter, quantizer, engine and record
CELL = "llama3_1_8b_mini-nf4-lora_r8-tfns-b4-s0"
ABSENT = """
import importlib.machinery

found = importlib.machinery.PathFinder.find_spec

def find_spec(finder, name, path=None, target=None):
    return None if name.partition(".")[0] == "{package}" else found(name, path, target)

importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""


def run(folder: Path, package: str, *arguments: str):
    """A command of ours where `package` cannot be found; every process that it starts is in the
    same situation.
    """
    (folder / "sitecustomize.py").write_text(ABSENT.format(package=package))
    return python(
        "-m", "invoke", *arguments, PYTHONPATH=str(folder), FINREPRO_STORE=str(folder / "store")
    )


def cell(folder: Path, package: str):
    return run(
        folder,
        package,
        "reproduce",
        "--table",
        "5",
        "--scale",
        "smoke",
        "--weights",
        "random",
        "--only",
        CELL,
    )


def test_with_all_of_them_the_cell_is_done(tmp_path: Path):
    answer = cell(tmp_path, "none_of_them")
    assert answer.returncode == 0 and f"done {CELL}" in answer.stdout, answer.stdout + answer.stderr


@pytest.mark.parametrize("package", ["deepspeed", "peft", "bitsandbytes", "transformers", "torch"])
def test_without_it_the_cell_fails_by_its_name(package: str, tmp_path: Path):
    answer = cell(tmp_path, package)
    assert answer.returncode in (EnvironmentFault.exit_code, CellFailed.exit_code), (
        answer.stdout + answer.stderr
    )
    assert f"'{package}'" in answer.stdout + answer.stderr
    (result,) = open_store(tmp_path / "store").results.glob("runs/*/result.json")
    read = json.loads(result.read_text())
    assert read["status"] == FAILED and f"'{package}'" in read["reason"] and not read["scores"]


def test_without_mlflow_nothing_is_called_recorded(tmp_path: Path):
    answer = cell(tmp_path, "mlflow")
    assert answer.returncode == EnvironmentFault.exit_code, answer.stdout + answer.stderr
    said = "finrepro: MLflow's view cannot be written (the package mlflow is missing"
    assert answer.stderr.splitlines()[-1].startswith(said)
    assert not (tmp_path / "store" / "mlruns" / "mlflow.db").exists()


def test_without_datasets_no_split_of_the_hub_is_fetched(tmp_path: Path):
    answer = run(tmp_path, "datasets", "data", "--fetch", "nwgi")
    assert answer.returncode == EnvironmentFault.exit_code
    assert (
        "the package 'datasets' is not installed" in answer.stderr
        and answer.stderr.count("\n") == 1
    )
