"""Evidence is not lost and not mistaken: finished results outlive what replaces them, and a
changed base shows.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures import results

from finrepro import PROJECT
from finrepro.catalogue.cells import expand
from finrepro.catalogue.resolve import Cell
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec
from finrepro.evidence import files, provenance, store
from finrepro.evidence.manifest import damaged_files
from finrepro.evidence.place import Place
from finrepro.evidence.result import header, seal_unfinished
from finrepro.planning import plan
from finrepro.reporting.rows import rows
from finrepro.tracking.check import check_store

CELL = "gpt2_127m_mini-none-full-tfns-s0"


def seal_done(
    spec: RunSpec, place: Place, weights: bytes = b"w", source: str | None = None, **facts: Any
) -> None:
    """A finished run as the walk seals it, made by this source or another."""
    result = header(spec, store.DONE, None, 0.0) | {"data": results.data(**facts)}
    if source:
        result["environment"] |= {"source_digest": source}
    with place.store.new_run(spec.run_id) as folder:
        (folder / "weights").mkdir()
        (folder / "weights" / "model.safetensors").write_bytes(weights)
        files.write_json(folder / "result.json", result)


def content(folder: Path) -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def cell() -> Cell:
    (found,) = expand(Selection("3", only=CELL), "smoke")
    return found


def base_facts(place: Place, base: RunSpec, source: str) -> dict[str, Any]:
    digests = {"source_digest": source, "lock_digest": provenance.lock_digest()}
    return {"run_id": base.run_id, "weights": place.store.weights_digest(base.run_id), **digests}


def test_a_stale_result_that_cannot_be_made_again_here_is_kept(place: Place) -> None:
    """One edited line must not wipe a store of the paper's scale on the next laptop."""
    (real,) = expand(Selection("3", only="gpt2_127m-nf4-lora_r8-tfns-s0"), "paper")
    seal_done(real.spec, place, source="another")
    (step,) = plan.plan_steps([real], place, keep=False)
    assert (step.action, step.state) == ("keep", store.STALE)
    assert (
        "cannot be made again" in step.reason
        and "weights of openai-community/gpt2 not found" in step.reason
    )


def test_a_failure_does_not_take_the_place_of_a_finished_result(place: Place, cell: Cell) -> None:
    seal_done(cell.spec, place, source="another")
    before = content(place.store.run_folder(cell.spec.run_id))
    seal_unfinished(cell.spec, place.store, store.FAILED, "it broke", 0.0)
    assert place.store.state(cell.spec) == store.STALE
    assert content(place.store.run_folder(cell.spec.run_id)) == before
    (attempt,) = (place.store.results / "attempts").iterdir()
    assert damaged_files(attempt) == []
    (row,) = rows([cell], place)
    assert row["reason"].endswith("made again, it failed: it broke")
    seal_done(cell.spec, place)
    assert place.store.state(cell.spec) == store.DONE
    (row,) = rows([cell], place)
    assert row["reason"] == "", "the attempt is older than the result"


def test_a_finished_result_that_another_one_replaces_is_kept(place: Place, cell: Cell) -> None:
    for number in range(3):
        seal_done(cell.spec, place, weights=bytes([number]))
    assert place.store.state(cell.spec) == store.DONE
    kept = sorted((place.store.results / "superseded").iterdir())
    assert [path.name.partition("-")[0] for path in kept] == [cell.spec.run_id] * 2
    weights = {(path / "weights" / "model.safetensors").read_bytes() for path in kept}
    assert weights == {b"\0", b"\1"} and not any(damaged_files(path) for path in kept)


def test_a_failure_makes_room_for_the_next_attempt(place: Place, cell: Cell) -> None:
    for status in (store.FAILED, store.DIVERGED, store.SKIPPED):
        seal_unfinished(cell.spec, place.store, status, "it broke", 0.0)
        assert place.store.state(cell.spec) == status
    seal_done(cell.spec, place)
    assert place.store.state(cell.spec) == store.DONE
    assert not (place.store.results / "superseded").exists()
    assert not (place.store.results / "attempts").exists()


def test_a_result_on_another_base_is_stale(place: Place, cell: Cell) -> None:
    base = cell.base
    assert base is not None
    here = provenance.source_digest()
    seal_done(base, place, weights=b"first")
    seal_done(cell.spec, place, base=base_facts(place, base, here))
    assert place.store.state(cell.spec) == store.DONE
    seal_done(base, place, weights=b"first")
    assert place.store.state(cell.spec) == store.DONE, "made again with the same bits"
    seal_done(base, place, weights=b"second")
    assert place.store.state(cell.spec) == store.STALE


def test_a_result_on_a_kept_stale_base_is_stale_itself(place: Place, cell: Cell) -> None:
    base = cell.base
    assert base is not None
    seal_done(base, place, source="another")
    seal_done(cell.spec, place, base=base_facts(place, base, "another"))
    assert place.store.state(cell.spec) == store.STALE


def test_a_half_written_line_of_the_scorings_is_no_reason_to_fail(place: Place, cell: Cell) -> None:
    place.store.scorings.note(cell.spec, "tfns")
    path = place.store.results / "scorings.jsonl"
    path.write_text(path.read_text() + '\n{"run_id": "0123')
    place.store.scorings.note(cell.spec, "tfns")
    other = dataclasses.replace(cell.spec, seed=9)
    assert place.store.scorings.times(cell.spec) == 2 and place.store.scorings.times(other) == 0
    assert check_store(place.store).damaged_scorings == 1


def test_the_zero_settings_belong_to_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = provenance.source_digest()
    copy = tmp_path / "project"
    (copy / "configs" / "deepspeed").mkdir(parents=True)
    (copy / "finrepro").symlink_to(provenance.PROJECT / "finrepro")
    monkeypatch.setattr(provenance, "PROJECT", copy)
    provenance.source_digest.cache_clear()
    assert provenance.source_digest() != before
    monkeypatch.undo()
    provenance.source_digest.cache_clear()
    assert provenance.source_digest() == before


def test_an_image_built_without_a_commit_says_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "REVISION").write_text("unknown\n")
    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    provenance.commit.cache_clear()
    assert provenance.commit() == (None, None)
    monkeypatch.undo()
    provenance.commit.cache_clear()


def test_more_devices_than_there_are_is_a_reason(place: Place) -> None:
    (many,) = expand(Selection("3", only=CELL, world_size=4096), "smoke")
    assert "needs 4096 devices" in str(plan.cannot_run(many.spec, place))


def test_the_lock_is_known_without_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`./run` leaves a copy of what it installed; one that is no longer the project's is none."""
    lock = PROJECT / "requirements" / "cpu.lock"
    right = hashlib.sha256(lock.read_bytes()).hexdigest()

    def found() -> tuple[str | None, str | None]:
        provenance.lock_name.cache_clear()
        provenance.lock_digest.cache_clear()
        return provenance.lock_name(), provenance.lock_digest()

    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("FINREPRO_LOCK", raising=False)
    try:
        assert found() == (None, None)
        (tmp_path / "dev.lock").write_bytes(lock.read_bytes())
        assert found() == (None, None), "the lock of what tests and checks need"
        (tmp_path / "cpu.lock").write_bytes(lock.read_bytes())
        assert found() == ("requirements/cpu.lock", right)
        (tmp_path / "cpu.lock").write_bytes(lock.read_bytes() + b"#")
        assert found() == (None, None)
        monkeypatch.setenv("FINREPRO_LOCK", "requirements/cpu.lock")
        assert found() == ("requirements/cpu.lock", right)
    finally:
        monkeypatch.undo()
        found()
