"""A store made by an older version is read, shown and exported; its results are stale, by name,
and nothing of them is lost.

`store_of_2bd6da0` has two runs of Table 3 as commit 2bd6da0 made them, an adapter and a skipped
cell, with the campaign that they are of. The processor's name is another, with its line in the
manifest; the predictions are compressed.
"""

import gzip
import json
import shutil
import time
from pathlib import Path

import pytest
from fixtures.json_schema import faults, result_faults
from fixtures.process import forget

from finrepro import PROJECT
from finrepro.catalogue.cells import expand
from finrepro.catalogue.resolve import Cell
from finrepro.catalogue.selection import Selection
from finrepro.evidence import store
from finrepro.evidence.files import read_lines
from finrepro.evidence.manifest import damaged_files
from finrepro.evidence.place import Place
from finrepro.evidence.result import seal_unfinished
from finrepro.evidence.store import open_store
from finrepro.exporting import recorded
from finrepro.planning import plan
from finrepro.reporting.tabulate import tabulate

MADE = PROJECT / "tests" / "evidence" / "store_of_2bd6da0"
DONE, SKIPPED = "aaec0a61dac3", "4096e735b3ff"
SELECTION = Selection("3", only="gpt2_127m_mini-none-lora_r4-tfns-s0")


@pytest.fixture
def older(tmp_path: Path) -> Place:
    """A copy to work in, its predictions as they were."""
    shutil.copytree(MADE, tmp_path / "store")
    for path in (tmp_path / "store").rglob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    return Place(open_store(tmp_path / "store"))


@pytest.fixture
def cell(configs: Path) -> Cell:
    """The cell by the settings of then, when miniatures had two threads."""
    for path in (configs / "models.yaml", configs / "tables" / "table3.yaml"):
        path.write_text(path.read_text().replace("threads: 1\n", "threads: 2\n"))
    forget()
    (cell,) = expand(SELECTION, "smoke")
    return cell


def content(place: Place) -> dict[str, bytes]:
    files = (path for path in place.store.results.rglob("runs/*/**/*") if path.is_file())
    return {str(path.relative_to(place.store.root)): path.read_bytes() for path in files}


def test_it_is_whole_and_as_the_schema_says(older: Place) -> None:
    for run_id in (DONE, SKIPPED):
        assert damaged_files(older.store.run_folder(run_id)) == []
        assert result_faults(older.store.result(run_id)) == []
    predictions = read_lines(older.store.run_folder(DONE) / "predictions.jsonl")
    assert len(predictions) == 2388 and not any(faults(row, "ChosenLine") for row in predictions)


def test_its_cells_are_found_and_stale(older: Place, cell: Cell) -> None:
    assert cell.spec.run_id == DONE, "the same settings are the same run as then"
    assert older.store.state(cell.spec) == store.STALE
    (skipped,) = expand(Selection("3", only="llama3_1_8b_mini-nf4-base-nwgi_7-s0"), "smoke")
    assert (skipped.spec.run_id, older.store.state(skipped.spec)) == (SKIPPED, store.SKIPPED)


def test_a_table_that_keeps_it_shows_its_scores(older: Place, cell: Cell) -> None:
    before = content(older)
    (step,) = [step for step in plan.plan_steps([cell], older, keep=True) if step.spec == cell.spec]
    assert (step.action, step.state) == ("keep", store.STALE)
    table = tabulate(SELECTION, "smoke", [cell], older)
    value = (older.store.result(DONE) or {})["scores"][0]["value"]
    shown = json.dumps([line.texts for line in table.lines])
    assert f"{value:.3f}" in shown and content(older) == before


def test_it_is_exported(older: Place) -> None:
    found = recorded.find_run(older.store, DONE, "peft")
    assert found.run_id == DONE and found.spec.adapter.kind == "lora"
    assert [path.name for path in found.weights.glob("*.safetensors")] == [
        "adapter_model.safetensors"
    ]


def test_a_failure_leaves_it_in_its_place(older: Place, cell: Cell) -> None:
    before = content(older)
    seal_unfinished(cell.spec, older.store, store.FAILED, "it broke", time.time())
    after = content(older)
    assert {name: after[name] for name in before} == before
    assert older.store.state(cell.spec) == store.STALE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
def test_the_view_in_mlflow_is_made_from_it(older: Place) -> None:
    from finrepro.tracking import index, rebuilding

    assert rebuilding.rebuild(older.store).cells == 1
    assert index.database(older.store).is_file()
