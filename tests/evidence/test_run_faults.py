"""A run is what was sealed, or it is damaged by name: files, their kinds, folder, id and spec."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finrepro.catalogue.cells import expand
from finrepro.catalogue.resolve import Cell
from finrepro.catalogue.selection import Selection
from finrepro.errors import Unavailable
from finrepro.evidence import store
from finrepro.evidence.files import write_json, write_lines
from finrepro.evidence.manifest import write_manifest
from finrepro.evidence.place import Place
from finrepro.evidence.result import header
from finrepro.evidence.run_faults import run_faults
from finrepro.planning.plan import plan_steps
from finrepro.reporting.frame import scores
from finrepro.reporting.rows import rows
from finrepro.running.base import open_base
from finrepro.tracking.check import check_store

LABEL = "gpt2_127m_mini-none-lora_r8-tfns-s0"


@pytest.fixture
def cell() -> Cell:
    (found,) = expand(Selection("3", only=LABEL), "smoke")
    return found


@pytest.fixture
def run(place: Place, cell: Cell) -> Path:
    """The folder of a finished run."""
    with place.store.new_run(cell.spec.run_id) as folder:
        write_lines(folder / "predictions.jsonl", [{"task": "tfns", "index": 0}])
        (folder / "weights").mkdir()
        (folder / "weights" / "model.safetensors").write_bytes(os.urandom(100))
        (folder / "weights" / "config.json").write_text("{}")
        write_json(folder / "result.json", header(cell.spec, store.DONE, None, 0.0))
    return place.store.run_folder(cell.spec.run_id)


def linked(run: Path) -> None:
    """The same bytes, elsewhere."""
    path = run / "weights" / "model.safetensors"
    path.symlink_to(path.rename(run.parent.parent / "elsewhere"))


def dangling(run: Path) -> None:
    (run / "weights" / "more").symlink_to(run / "nothing")


def root(run: Path) -> None:
    (run / "root").symlink_to("/")


def pipe(run: Path) -> None:
    os.mkfifo(run / "weights" / "pipe")


def manifest_as_pipe(run: Path) -> None:
    """Who opened it would wait for ever."""
    (run / "manifest.sha256").unlink()
    os.mkfifo(run / "manifest.sha256")


def folder_in_place(run: Path) -> None:
    (run / "predictions.jsonl").unlink()
    (run / "predictions.jsonl").mkdir()


def resealed(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """An edited result with a manifest that fits it."""
    result = json.loads((run / "result.json").read_text())
    change(result)
    write_json(run / "result.json", result)
    write_manifest(run)


def steps(run: Path) -> None:
    resealed(run, lambda result: result["spec"]["train"].update(max_steps=5000))


def seed(run: Path) -> None:
    resealed(run, lambda result: result["spec"].update(seed=7))


def status(run: Path) -> None:
    resealed(run, lambda result: result.update(status="finished"))


def value(run: Path) -> None:
    resealed(run, lambda result: result.update(scores=[{"task": "tfns", "value": "0.9"}]))


def deep(run: Path) -> None:
    (run / "result.json").write_text("[" * 5000 + "]" * 5000)
    write_manifest(run)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (linked, "weights/model.safetensors (is a symbolic link)"),
        (dangling, "weights/more (is a symbolic link)"),
        (root, "root (is a symbolic link)"),
        (pipe, "weights/pipe (is a named pipe)"),
        (manifest_as_pipe, "manifest.sha256"),
        (folder_in_place, "predictions.jsonl"),
        (steps, "result.json has the spec of run "),
        (seed, "result.json has the spec of run "),
        (status, "result.json holds no result (status: "),
        (value, "result.json holds no result (scores.0."),
        (deep, "result.json holds no result (no JSON that can be read)"),
    ],
)
def test_every_fault_is_named_by_whoever_reads_the_run(
    change: Callable[[Path], None], fault: str, run: Path, place: Place, cell: Cell
) -> None:
    assert place.store.state(cell.spec) == store.DONE and not run_faults(run)
    change(run)
    assert run_faults(run)[0].startswith(fault)
    assert check_store(place.store).damaged[run.name][0].startswith(fault)
    assert place.store.result(run.name) is None
    (row,) = rows([cell], place)
    assert row["state"] == store.DAMAGED and fault in row["reason"] and not row["scores"]
    frame = scores(place.store)
    assert list(frame.state) == [store.DAMAGED] and fault in frame.reason[0]
    (step,) = [step for step in plan_steps([cell], place, keep=False) if not step.is_base]
    assert step.action == "run" and f"it is damaged: {fault}" in step.reason


def test_a_run_under_another_id_is_not_that_run(run: Path, place: Place, cell: Cell) -> None:
    (other,) = expand(Selection("3", only=LABEL.replace("lora_r8", "lora_r4")), "smoke")
    copy = place.store.run_folder(other.spec.run_id)
    shutil.copytree(run, copy)
    assert run_faults(copy) == [f"result.json is that of run {run.name}"]
    assert place.store.state(other.spec) == store.DAMAGED
    shutil.rmtree(copy)
    copy.symlink_to(run)
    assert run_faults(copy) == [f"{copy.name} is no folder of its own"]
    assert place.store.state(cell.spec) == store.DONE


def test_the_weights_of_a_base_are_checked_before_they_are_read(place: Place, cell: Cell) -> None:
    base = cell.base
    assert base is not None
    with place.store.new_run(base.run_id) as folder:
        (folder / "weights").mkdir()
        (folder / "weights" / "model.safetensors").write_bytes(bytes(100))
        write_json(folder / "result.json", header(base, store.DONE, None, 0.0))
    path = place.store.run_folder(base.run_id) / "weights" / "model.safetensors"
    path.write_bytes(bytes(99) + b"\x01")
    assert place.store.state(base) == store.DONE, "a table reads no weights"
    fault = rf"run {base.run_id} is damaged \(weights/model.safetensors\)"
    with pytest.raises(Unavailable, match=fault):
        open_base(cell.spec, place)
    (step,) = [step for step in plan_steps([cell], place, keep=False) if step.is_base]
    assert step.action == "run" and "it is damaged: weights/model.safetensors" in step.reason


def test_what_is_damaged_and_cannot_be_made_here_stays_and_is_shown(place: Place) -> None:
    (real,) = expand(Selection("3", only="gpt2_127m-nf4-lora_r8-tfns-s0"), "paper")
    with place.store.new_run(real.spec.run_id) as folder:
        write_json(folder / "result.json", header(real.spec, store.DONE, None, time.time()))
    (place.store.run_folder(real.spec.run_id) / "result.json").write_text("{")
    (step,) = plan_steps([real], place, keep=False)
    assert (step.action, step.state) == ("keep", store.DAMAGED)
    assert "result.json; cannot be made again: " in step.reason
