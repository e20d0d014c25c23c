"""Law: a cell runs as it was planned or says why not: on its devices, from its own base, with
the reason of the rank that failed.
"""

import dataclasses
import errno
from functools import partial
from pathlib import Path

import pytest
import torch
from fixtures.json_schema import result_faults
from fixtures.model import process  # noqa: F401
from fixtures.process import python

from finrepro.campaigns.local import Worker
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.errors import CellFailed, DiskFull, UsageError
from finrepro.evidence import store
from finrepro.evidence.place import Place
from finrepro.running.cell import check_launch, run_cell
from finrepro.running.events import Event, emit_outcome
from finrepro.training.progress import Trained

TWO_RANKS = "llama2_13b_mini-none-lora_r8-tfns-s0"
FAILING = """
import importlib.machinery, os

found = importlib.machinery.PathFinder.find_spec.__func__

def find_spec(finder, name, path=None, target=None):
    if name.partition(".")[0] == "peft" and os.environ.get("RANK") == "1":
        return None
    return found(finder, name, path, target)

importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""


def test_a_launch_with_another_number_of_ranks_is_refused():
    (cell,) = expand(Selection("3", only=TWO_RANKS), "smoke")
    with pytest.raises(
        UsageError, match=r"runs on 2 device\(s\), and 1 process\(es\) were started"
    ):
        check_launch(cell.spec)
    (alone,) = expand(Selection("3", only=TWO_RANKS, world_size=1), "smoke")
    check_launch(alone.spec)


def test_a_refused_cell_is_refused_however_it_is_started(tmp_path: Path):
    label = "gpt2_127m_mini-nf4-full-tfns-s0"
    place = ("--store", str(tmp_path))
    answer = python(
        "-m", "finrepro.running.cell", "--table", "3", "--scale", "smoke", "--cell", label, *place
    )
    assert answer.returncode == 2 and "cannot train weights stored as nf4" in answer.stderr
    assert not list((tmp_path / "results" / "runs").iterdir())


def test_a_cell_whose_base_cannot_be_used_is_skipped_with_the_reason(place: Place, process: None):  # noqa: F811
    (cell,) = expand(Selection("3", only="gpt2_127m_mini-none-base-tfns-s0"), "smoke")
    result = run_cell(cell.spec, place, lambda _: None, lambda: False)
    assert result["status"] == store.SKIPPED and "the base of" in result["reason"]
    assert result_faults(result) == []
    assert place.store.state(cell.spec) == store.SKIPPED


def test_a_wrong_dataset_file_costs_its_cells_and_no_campaign(
    place: Place,
    process: None,  # noqa: F811
    tmp_path: Path,
):
    only = "gpt2_127m_mini-none-full-tfns-s0"
    (cell,) = expand(Selection("3", only=only, weights="random"), "smoke")
    place = dataclasses.replace(place, data_dir=tmp_path / "data")
    path = tmp_path / "data" / cell.spec.tasks[0].dataset.config.files["train"].path
    path.parent.mkdir(parents=True)
    path.write_text("text,label\n", encoding="utf-8")
    events: list[Event] = []
    run = partial(run_cell, cell.spec, place, lambda _: None, lambda: False)
    assert emit_outcome(events.append, run) == CellFailed.exit_code
    assert events[-1]["event"] == "result", "a fault would end the campaign"
    assert place.store.state(cell.spec) == store.FAILED
    assert events[-1]["reason"].startswith(f"{path}: sha256 is ")


def test_weights_that_the_last_step_made_no_numbers_are_not_sealed(
    place: Place,
    process: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    """The loss of no step has seen them."""

    def trained(model: torch.nn.Module, *_: object) -> Trained:
        with torch.no_grad():
            model.get_parameter("transformer.wte.weight")[5, 5] = torch.nan
        return Trained()

    monkeypatch.setattr("finrepro.running.walk.train", trained)
    only = "gpt2_127m_mini-none-full-tfns-s0"
    (cell,) = expand(Selection("3", only=only, weights="random"), "smoke")
    result = run_cell(cell.spec, place, lambda _: None, lambda: False)
    assert result["status"] == store.DIVERGED
    assert result["reason"] == (
        "diverged: transformer.wte.weight holds NaN or an infinity after the last step."
    )


def test_an_interrupted_worker_takes_no_other_cell(place: Place, tmp_path: Path):
    selection = Selection("3", quick=True)
    worker = Worker(place, selection, "smoke", tmp_path / "log")
    worker.interrupt()
    spec = expand(selection, "smoke")[0].spec
    assert worker.run(spec, lambda _: None)["event"] == "interrupted" and worker.process is None


@pytest.mark.slow
def test_the_rank_that_failed_gives_the_reason(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    options = (
        "--scale",
        "smoke",
        "--weights",
        "random",
        "--only",
        TWO_RANKS,
        "--store",
        str(tmp_path / "store"),
    )
    answer = python("-m", "invoke", "reproduce", "--table", "3", *options, PYTHONPATH=str(tmp_path))
    assert answer.returncode == 4 and "Traceback" not in answer.stdout + answer.stderr, (
        answer.stderr
    )
    assert "rank 1: ModuleNotFoundError: No module named 'peft'" in answer.stdout
    assert (
        TWO_RANKS in (tmp_path / "store/results/tables/smoke/table3-random_weights.md").read_text()
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=["torch", "system"],
)
def test_a_full_disk_ends_the_campaign_and_is_no_failure_of_the_cell(
    error: Exception, place: Place, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("finrepro.running.walk.walk", full)
    (cell,) = expand(Selection("3", only="gpt2_127m_mini-none-base-tfns-s0"), "smoke")
    with pytest.raises(DiskFull, match="no space left"):
        run_cell(cell.spec, place, lambda _: None, lambda: False)
    assert not list((place.store.results / "runs").iterdir())
