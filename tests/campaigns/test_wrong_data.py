"""Law: a dataset's file with an unknown label costs its own cells, and no other."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from fixtures.evidence import results
from fixtures.process import python

from finrepro import PROJECT

WRONG, RIGHT = (f"llama2_7b_mini-none-base-{data}-s0" for data in ("fin_ner", "fpb"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project in which no source pins the bytes of two datasets."""
    for part in ("finrepro", "configs"):
        shutil.copytree(
            PROJECT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(PROJECT / "tasks.py", tmp_path)
    path = tmp_path / "configs" / "datasets.yaml"
    datasets = yaml.safe_load(path.read_text())
    for name in ("fin_ner", "fpb"):
        for file in datasets[name]["files"].values():
            file |= {"sha256": None, "rows": None}
    datasets["fpb"]["split"]["test_rows"] = 12
    path.write_text(yaml.safe_dump(datasets, sort_keys=False))
    return tmp_path


def data_with(tag: str, folder: Path) -> Path:
    """A folder with both datasets' files; the first sentence of the one has an entity `tag`."""
    for name, text in {
        "fin_ner/FIN3.txt": f"-DOCSTART- -X- O O\n\nAcme NNP B-NP {tag}\npays VBZ B-VP O\n",
        "fpb/Sentences_50Agree.txt": "\n".join(
            f"Sales rose by {number} %.@{label}"
            for number, label in enumerate(["positive", "neutral", "negative"] * 6)
        ),
    }.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    return folder


def reproduce(project: Path, data: Path) -> "subprocess.CompletedProcess[str]":
    return python(
        *("-m", "invoke", "reproduce", "--table", "3", "--scale", "smoke", "--full", "--jobs", "1"),
        *("--weights", "random", "--only", "llama2_7b_mini-none-base-f[ip][nb]*-s0"),
        *("--data-dir", str(data), "--store", str(project / "store")),
        cwd=project,
        PYTHONPATH=str(project),
    )


@pytest.mark.slow
def test_a_wrong_file_costs_its_own_cell_and_the_table_is_printed(project: Path) -> None:
    answer = reproduce(project, data_with("I-PRE", project / "data"))
    assert answer.returncode == 4, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stdout + answer.stderr
    found = results(project / "store")
    assert {label: result["status"] for label, result in found.items()} == {
        WRONG: "failed",
        RIGHT: "done",
    }
    assert found[WRONG]["started"] < found[RIGHT]["started"], "the wrong one ran first"
    reason = str(found[WRONG]["reason"])
    assert "dataset 'fin_ner'" in reason and "I-PRE" in reason and "\n" not in reason
    (table,) = (project / "store" / "results" / "tables" / "smoke").glob("*.md")
    assert re.search(r"I-PRE", table.read_text()), "the table says why"
    assert "Table 3" in answer.stdout and "I-PRE" in answer.stdout
