"""Law: MLflow's view is a projection - made cell by cell or rebuilt from the files it says the same, wherever the store lies."""

import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fixtures_process import python

from finrepro import provenance, record, store
from finrepro.cells import Selection, expand
from finrepro.manifest import damaged_files
from finrepro.result import header, seal_unfinished
from finrepro.spec import RunSpec
from finrepro.store import Store, open_store

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
SPECS = [cell.spec for cell in expand(Selection("3"), "smoke") if cell.refusal is None]
MADE_BY = provenance.environment() | {"git_commit": "c" * 40, "git_dirty": False}
LOSSES = [4.0, 3.5, float("nan"), float("inf"), float("-inf"), 1e-300]


def score(task: str, metric: str, value: float) -> dict[str, Any]:
    more = {"gain": 0.1, "gain_low": 0.05, "gain_high": 0.15, "constant_answer": "neutral"}
    return {
        "task": task,
        "metric": metric,
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "n": 9,
        "constant": 0.5,
    } | more


def seal_done(spec: RunSpec, place: Store, accuracy: float = 0.75) -> None:
    """A finished result as a cell leaves it, with a loss curve that is not all numbers."""
    started = time.time() - 60
    task = spec.train_on.task.name
    result = header(spec, store.DONE, None, started) | {
        "environment": MADE_BY,
        "scores": [score(task, "accuracy", accuracy), score(task, "mcc", float("nan"))],
        "costs": {
            "train_seconds": 3.5,
            "peak_memory_bytes": 2**31,
            "final_loss": float("inf"),
            "tokens_per_second": None,
        },
        "data": {
            "fingerprints": {"train": "a" * 64, "development": "b" * 64, "test": "c" * 64},
            "files": {"train": "d" * 64},
        },
    }
    with place.new_run(spec.run_id) as target:
        rows = [
            {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 0.001, "seconds": step * 0.5, "tokens": 10}
            for step, loss in enumerate(LOSSES, 1)
        ]
        store.write_lines(target / "loss.jsonl", rows)
        store.write_lines(
            target / "system.jsonl", [{"time": started + s, "process_memory_gib": 1.0 + s} for s in range(3)]
        )
        store.write_lines(target / "predictions.jsonl", [{"id": "x", "prediction": "a\u2028b"}])
        store.write_json(target / "result.json", result)


@dataclass
class Campaign:
    """A campaign's record, kept as `reproduce` keeps it."""

    place: Store
    name: str
    started: float
    cells: list[dict[str, Any]] = field(default_factory=list)
    status: str = "running"

    def record(self) -> dict[str, Any]:
        values = {
            "id": self.name, "table": "table3", "rendered": "table3",
            "scale": "smoke", "status": self.status, "command": "reproduce --table 3",
            "started": self.started, "ended": self.started + 10, "cells": self.cells, "environment": MADE_BY,
        }  # fmt: skip
        store.write_json(self.place.results / "campaigns" / f"{self.name}.json", values)
        return values

    def note(self, spec: RunSpec, outcome: str, status: str) -> None:
        self.cells.append({"label": spec.label, "run_id": spec.run_id, "outcome": outcome, "status": status})


def two_campaigns(place: Store) -> None:
    """Cells done, skipped and failed, shown one by one; then another campaign that keeps one and makes the failed one anew."""
    done, skipped, failed, random = SPECS[:4]
    first = Campaign(place, "20240101T000000Z-aaaaaa", 1.7e9)
    view = record.View(place)
    parent = view.campaign(first.record())
    seal_done(done, place)
    first.note(done, "ran", "done")
    view.cell(done.run_id, first.record(), parent)
    seal_unfinished(skipped, place, store.SKIPPED, "weights of 'x' not found: it's 50 % | and \"more\"", time.time())
    first.note(skipped, "skipped", "skipped")
    view.cell(skipped.run_id, first.record(), parent)
    seal_unfinished(
        failed, place, store.FAILED, "RuntimeError: no", time.time(), "Traceback (most recent call last): ..."
    )
    first.note(failed, "ran", "failed")
    view.cell(failed.run_id, first.record(), parent)
    folder = place.results / "tables" / "smoke"
    folder.mkdir(parents=True)
    (folder / "table3.md").write_text("**Table 3 - SMOKE**\n")
    (folder / "table3.json").write_text("{}\n")
    first.status = "with failed cells"
    view.campaign(first.record())

    second = Campaign(place, "20240102T000000Z-aaaaaa", 1.7e9 + 86400)
    again = record.View(place)
    second.note(done, "kept", "done")
    parent = again.campaign(second.record())
    seal_done(failed, place, 0.8)
    second.note(failed, "ran", "done")
    again.cell(failed.run_id, second.record(), parent)
    seal_done(random, place, 0.6)
    second.note(random, "ran", "done")
    again.cell(random.run_id, second.record(), parent)
    second.status = "finished"
    again.campaign(second.record())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of two campaigns, shown cell by cell. Not to be changed: copy it."""
    place = open_store(tmp_path_factory.mktemp("record") / "store")
    two_campaigns(place)
    return place


@pytest.fixture
def copied(made: Store, tmp_path: Path) -> Iterator[Store]:
    """A copy of the store somewhere else."""
    shutil.copytree(made.root, tmp_path / "moved" / "store")
    yield open_store(tmp_path / "moved" / "store")


def client(place: Store) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=record.tracking_uri(place))


def runs(place: Store) -> list[Any]:
    found = client(place)
    return list(found.search_runs([found.get_experiment_by_name("table3").experiment_id]))


def shown(value: float) -> float | str:
    return str(value) if not math.isfinite(value) else value


def content(place: Store) -> dict[str, Any]:
    """Everything that a reader of the view sees, without the ids that MLflow draws."""
    found = client(place)
    every = runs(place)
    names = {run.info.run_id: run.data.tags["campaign"] for run in every if run.data.tags["role"] == "campaign"}
    seen = {}
    for run in every:
        tags = {key: value for key, value in run.data.tags.items() if key not in ("mlflow.user", "mlflow.parentRunId")}
        parent = run.data.tags.get("mlflow.parentRunId")
        key = tags.get("run_id") or tags["campaign"]
        assert key not in seen, f"{key} is shown twice"
        history = {
            metric: [(m.step, m.timestamp, shown(m.value)) for m in found.get_metric_history(run.info.run_id, metric)]
            for metric in sorted(run.data.metrics)
        }
        inputs = sorted(
            (i.dataset.name, i.dataset.digest, i.dataset.source, tuple((t.key, t.value) for t in i.tags))
            for i in run.inputs.dataset_inputs
        )
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        assert folder.is_relative_to(place.root), f"artifacts of {place.root} lie in {folder}"
        artifacts = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        info = (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time)
        seen[key] = {
            "info": info, "tags": tags, "parent": names.get(parent), "params": run.data.params, "metrics": history,
            "inputs": inputs, "artifacts": artifacts,
        }  # fmt: skip
    return seen


def test_a_view_made_cell_by_cell_equals_one_rebuilt_elsewhere(made: Store, copied: Store):
    before = content(made)
    assert record.rebuild(copied) == 4
    after = content(copied)
    assert before.keys() == after.keys() and len(before) == 2 + 4
    for key, run in before.items():
        for part in run:
            assert run[part] == after[key][part], f"{part} of {key}"


def test_a_cell_can_be_found_by_what_it_is_and_lies_under_its_campaign(made: Store):
    seen = content(made)
    done, skipped, failed, _ = SPECS[:4]
    run = seen[done.run_id]
    wanted = {
        "model": done.model.name, "adapter": done.adapter.name, "quantizer": done.quantizer.name,
        "train_on": done.train_on.task.name, "seed": "0", "table": "table3", "scale": "smoke", "status": "done",
        "run_id": done.run_id, "git_commit": "c" * 40, "role": "cell",
    }  # fmt: skip
    assert wanted.items() <= run["tags"].items()
    assert run["parent"] == "20240101T000000Z-aaaaaa" and seen[failed.run_id]["parent"] == "20240102T000000Z-aaaaaa"
    assert [seen[spec.run_id]["info"][1] for spec in (done, skipped, failed)] == ["FINISHED", "KILLED", "FINISHED"]
    assert seen[skipped.run_id]["tags"]["reason"].startswith("weights of 'x' not found: it's 50 %")
    assert seen[failed.run_id]["tags"]["status"] == "done", "the newer result"
    assert "SMOKE" in run["tags"]["mlflow.note.content"]
    assert {"result.json", "manifest.sha256", "predictions.jsonl"} <= set(run["artifacts"])
    names = [row[0] for row in run["inputs"]]
    assert names == [f"{done.train_on.dataset.name}/{split}" for split in ("development", "test", "train")]


def test_a_campaign_carries_its_table_as_note_and_artifact(made: Store):
    parent = content(made)["20240102T000000Z-aaaaaa"]
    assert parent["tags"]["mlflow.note.content"] == "**Table 3 - SMOKE**\n"
    assert set(parent["artifacts"]) == {"table/table3.md", "table/table3.json"}
    assert parent["info"][1] == "FINISHED"
    assert content(made)["20240101T000000Z-aaaaaa"]["info"][1] == "FAILED", "one of its cells failed"


def test_scores_costs_and_losses_come_through_and_what_is_no_number_stays_none(made: Store):
    run = content(made)[SPECS[0].run_id]
    task = SPECS[0].train_on.task.name
    assert [value for _, _, value in run["metrics"][f"eval/{task}/accuracy"]] == [0.75]
    assert [value for _, _, value in run["metrics"][f"eval/{task}/accuracy/constant"]] == [0.5]
    assert [value for _, _, value in run["metrics"][f"eval/{task}/mcc"]] == ["nan"]
    assert [value for _, _, value in run["metrics"]["cost/peak_memory_bytes"]] == [2**31]
    assert "cost/tokens_per_second" not in run["metrics"]
    losses = {step: value for step, _, value in run["metrics"]["train/loss"]}
    huge = sys.float_info.max  # what MLflow's database keeps of an infinity
    assert losses == {1: 4.0, 2: 3.5, 3: "nan", 4: huge, 5: -huge, 6: 1e-300}
    kept = store.read_lines(made.run_folder(SPECS[0].run_id) / "loss.jsonl")
    assert [shown(row["loss"]) for row in kept] == [shown(loss) for loss in LOSSES], "the evidence keeps infinities"
    assert len(run["metrics"]["system/process_memory_gib"]) == 3


def test_showing_a_cell_twice_adds_nothing(copied: Store):
    record.rebuild(copied)
    before = content(copied)
    view = record.View(copied)
    for campaign in copied.campaigns():
        parent = view.campaign(campaign)
        for cell in campaign["cells"]:
            if cell["outcome"] != "kept":
                view.cell(cell["run_id"], campaign, parent)
    assert content(copied) == before


def test_a_cell_that_was_shown_in_part_is_shown_again_whole(copied: Store):
    record.rebuild(copied)
    before = content(copied)
    spec = SPECS[0]
    (run,) = [run for run in runs(copied) if run.data.tags.get("run_id") == spec.run_id]
    client(copied).delete_tag(run.info.run_id, "result_digest")  # the last thing that is written of a cell
    campaign = copied.campaigns()[0]
    view = record.View(copied)
    view.cell(spec.run_id, campaign, view.campaign(campaign))
    assert content(copied) == before


def test_a_moved_store_is_shown_from_where_it_lies(copied: Store, made: Store):
    untouched = {
        path: path.stat().st_mtime_ns for path in (made.root / "mlruns").rglob("*") if "artifacts" in path.parts
    }
    campaign = Campaign(copied, "20240103T000000Z-aaaaaa", 1.7e9 + 2 * 86400)
    view = record.View(copied)
    parent = view.campaign(campaign.record())
    seal_done(SPECS[4], copied)
    campaign.note(SPECS[4], "ran", "done")
    view.cell(SPECS[4].run_id, campaign.record(), parent)
    campaign.status = "finished"
    view.campaign(campaign.record())
    seen = content(copied)  # which checks where the artifacts lie
    assert seen[SPECS[4].run_id]["artifacts"] and len(seen) == 3 + 5
    shutil.copytree(copied.root, copied.root.with_name("again"))
    again = open_store(copied.root.with_name("again"))
    record.rebuild(again)
    assert content(again) == seen
    now = {path: path.stat().st_mtime_ns for path in (made.root / "mlruns").rglob("*") if "artifacts" in path.parts}
    assert now == untouched, "the view of the moved store wrote into the old place"


def test_planted_files_of_another_backend_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = open_store(tmp_path / "store")
    planted = [folder / "mlruns" / "0" / "meta.yaml" for folder in (place.root, tmp_path)]
    for path in planted:
        path.parent.mkdir(parents=True)
        path.write_text("experiment_id: '0'\nname: Default\nartifact_location: /nowhere\nlifecycle_stage: active\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "elsewhere"))
    campaign = Campaign(place, "20240101T000000Z-aaaaaa", 1.7e9)
    view = record.View(place)
    parent = view.campaign(campaign.record())
    seal_unfinished(SPECS[0], place, store.SKIPPED, "no reason", time.time())
    view.cell(SPECS[0].run_id, campaign.record(), parent)
    assert record.database(place).read_bytes()[:15] == b"SQLite format 3"
    assert content(place)[SPECS[0].run_id]["tags"]["status"] == "skipped"
    assert sorted(tmp_path.glob("mlruns/**/*")) == [tmp_path / "mlruns" / "0", tmp_path / "mlruns" / "0" / "meta.yaml"]
    assert not (tmp_path / "elsewhere").exists()


REBUILD = """
import sys
from pathlib import Path
from finrepro import record, store
place = store.open_store(Path(sys.argv[1]))
print(record.rebuild(place))
view = record.View(place)
for run in view.client.search_runs([view.experiment("table3")], "tags.status = 'done'"):
    print(run.data.tags["git_commit"], run.data.tags["mlflow.source.git.commit"])
"""


@pytest.mark.slow
def test_the_commit_is_shown_where_there_is_no_git(copied: Store):
    answer = python("-W", "ignore", "-c", REBUILD, str(copied.root), PATH=str(copied.root))
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0] == "4" and lines[1:] == [f"{'c' * 40} {'c' * 40}"] * 3
    assert "git" not in answer.stderr.lower()


def test_a_damaged_record_of_a_campaign_is_one_line(copied: Store):
    from fixtures_process import one_line

    from finrepro.errors import EnvironmentFault

    path = copied.results / "campaigns" / "20240101T000000Z-aaaaaa.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(EnvironmentFault) as refused:
        record.rebuild(copied)
    assert str(path) in one_line(refused.value)


def test_the_evidence_is_not_touched_by_a_rebuild(copied: Store):
    def evidence() -> dict[str, bytes]:
        return {p.relative_to(copied.root).as_posix(): p.read_bytes() for p in copied.results.rglob("*") if p.is_file()}

    before = evidence()
    record.rebuild(copied)
    assert evidence() == before
    for folder in (copied.results / "runs").iterdir():
        assert damaged_files(folder) == []


def test_mlflow_itself_says_that_it_sends_nothing(made: Store):
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()
