"""Law: MLflow's view is a projection - made cell by cell or rebuilt from the files it says the
same, wherever the store lies.
"""

import base64
import json
import math
import shutil
import sqlite3
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fixtures import results
from fixtures.process import one_line, python

from finrepro.campaigns.log import CampaignLog
from finrepro.campaigns.preview import CampaignOptions, CampaignPlan
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import EnvironmentFault
from finrepro.evidence import files, provenance, store
from finrepro.evidence.manifest import damaged_files
from finrepro.evidence.place import Place
from finrepro.evidence.result import header, seal_unfinished
from finrepro.evidence.store import Store, open_store
from finrepro.tracking import index, notes, projection, saved_views
from finrepro.tracking import library as mlflow_library
from finrepro.tracking.check import check_store
from finrepro.tracking.rebuilding import open_view, rebuild
from finrepro.tracking.view import MlflowView

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
SPECS = [cell.spec for cell in expand(Selection("3"), "smoke") if cell.refusal is None]
TASK = SPECS[0].tasks[0].task.name
DATASET = SPECS[0].tasks[0].dataset.name
MADE_BY = provenance.environment() | {"git_commit": "c" * 40, "git_dirty": False}
LOSSES = [4.0, 3.5, sys.float_info.max, -sys.float_info.max, 1e-300]


@pytest.fixture(scope="module", autouse=True)
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow's migrations of an empty database end with the same tables every time: they run
    once, and their file is copied afterwards.
    """
    folder = tmp_path_factory.mktemp("migrated")
    mlflow_library.load_mlflow(open_store(folder / "store"))
    from mlflow.store.db import utils

    migrate, template = utils._initialize_tables, folder / "mlflow.db"

    def copied(engine: Any) -> None:
        if template.exists():
            shutil.copyfile(template, engine.url.database)
        else:
            migrate(engine)
            shutil.copyfile(engine.url.database, template)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", copied)
        yield


def score(task: str, metric: str, value: float) -> dict[str, Any]:
    return results.score(task, metric, value, gain=0.1, gain_low=0.05, gain_high=0.15)


def seal_done(spec: RunSpec, place: Store, accuracy: float = 0.75) -> None:
    """A finished result as a cell leaves it, with a loss curve that is not all numbers."""
    started = time.time() - 60
    task = TASK
    result = header(spec, store.DONE, None, started) | {
        "environment": MADE_BY,
        "scores": [score(task, "accuracy", accuracy), score(task, "mcc", -0.25)],
        "costs": results.costs(final_loss=1e300, tokens_per_second=None),
        "data": results.data(
            fingerprints={DATASET: {"train": "a" * 64, "development": "b" * 64, "test": "c" * 64}},
            files={DATASET: {"train": "d" * 64}},
        ),
    }
    with place.new_run(spec.run_id) as target:
        rows = [
            {
                "step": step,
                "loss": loss,
                "grad_norm": 1.0,
                "lr": 0.001,
                "seconds": step * 0.5,
                "tokens": 10,
            }
            for step, loss in enumerate(LOSSES, 1)
        ]
        files.write_lines(target / "loss.jsonl", rows)
        files.write_lines(
            target / "system.jsonl",
            [{"time": started + s, "process_memory_gib": 1.0 + s} for s in range(3)],
        )
        files.write_lines(target / "predictions.jsonl", [{"id": "x", "prediction": "a\u2028b"}])
        files.write_json(target / "result.json", result)


@dataclass
class Campaign:
    """A campaign's record, kept as `reproduce` keeps it."""

    place: Store
    name: str
    started: float
    table: str = "table3"
    cells: list[dict[str, Any]] = field(default_factory=list)
    status: str = "running"

    def record(self) -> dict[str, Any]:
        values = {
            "id": self.name,
            "table": self.table,
            "rendered": self.table,
            "scale": "smoke",
            "status": self.status,
            "command": f"reproduce --table {self.table[-1]}",
            "started": self.started,
            "ended": self.started + 10,
            "cells": self.cells,
            "environment": MADE_BY,
        }
        files.write_json(self.place.results / "campaigns" / f"{self.name}.json", values)
        return values

    def note(self, spec: RunSpec, outcome: str, status: str) -> None:
        self.cells.append(
            {"label": spec.label, "run_id": spec.run_id, "outcome": outcome, "status": status}
        )


SKIP_REASON = "weights of 'x' not found: it's 50 % | and \"more\""
TABLE = {
    "caption": "Table 3 - <b>SMOKE</b>",
    "columns": ["Model", "Accuracy"],
    "notes": ["a note"],
    "lines": [
        {
            "texts": ["m & n", "0.750"],
            "section": "tfns",
            "evidence": {"cells": [{"run_id": SPECS[0].run_id}]},
        }
    ],
}


def three_campaigns(place: Store) -> None:
    """Cells done, skipped and failed, shown one by one; a campaign that keeps one and makes the
    failed one anew; one of another table.
    """
    done, skipped, failed, random = SPECS[:4]
    first = Campaign(place, "20240101T000000Z-aaaaaa", 1.7e9)
    view = open_view(place)
    parent = view.campaign(first.record())
    seal_done(done, place)
    first.note(done, "ran", "done")
    view.cell(done.run_id, first.record(), parent)
    seal_unfinished(skipped, place, store.SKIPPED, SKIP_REASON, time.time())
    first.note(skipped, "skipped", "skipped")
    seal_unfinished(
        failed,
        place,
        store.FAILED,
        "RuntimeError: no",
        time.time(),
        "Traceback (most recent call last): ...",
    )
    first.note(failed, "ran", "failed")
    view.cell(failed.run_id, first.record(), parent)
    folder = place.results / "tables" / "smoke"
    folder.mkdir(parents=True)
    (folder / "table3.md").write_text("**Table 3 - SMOKE**\n")
    files.write_json(folder / "table3.json", TABLE)
    first.status = "with failed cells"
    view.campaign(first.record())

    second = Campaign(place, "20240102T000000Z-aaaaaa", 1.7e9 + 86400)
    again = open_view(place)
    second.note(done, "kept", "done")
    parent = again.campaign(second.record())
    seal_done(failed, place, 0.8)
    second.note(failed, "ran", "done")
    again.cell(failed.run_id, second.record(), parent)
    seal_unfinished(random, place, store.DIVERGED, "loss is nan in step 3", time.time())
    second.note(random, "ran", "diverged")
    again.cell(random.run_id, second.record(), parent)
    second.status = "finished"
    again.campaign(second.record())

    third = Campaign(place, "20240103T000000Z-aaaaaa", 1.7e9 + 2 * 86400, "table5")
    beside = open_view(place)
    parent = beside.campaign(third.record())
    third.note(done, "found", "done")
    beside.cell(done.run_id, third.record(), parent)
    seal_done(random, place, 0.6)  # which was this table's cell as well
    third.note(random, "ran", "done")
    beside.cell(random.run_id, third.record(), parent)
    third.status = "finished"
    beside.campaign(third.record())


@pytest.fixture(scope="module")
def populated(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of three campaigns, shown cell by cell. Not to be changed: copy it."""
    place = open_store(tmp_path_factory.mktemp("record") / "store")
    three_campaigns(place)
    return place


@pytest.fixture
def copied(populated: Store, tmp_path: Path) -> Iterator[Store]:
    """A copy of the store somewhere else."""
    shutil.copytree(populated.root, tmp_path / "moved" / "store")
    yield open_store(tmp_path / "moved" / "store")


def client(place: Store) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=index.tracking_uri(place))


def experiments(place: Store) -> dict[str, str]:
    """Name -> id of the experiments that the view lists."""
    return {e.name: e.experiment_id for e in client(place).search_experiments()}


def runs(place: Store, table: str = "table3") -> list[Any]:
    return list(client(place).search_runs([experiments(place)[f"{table}-smoke"]]))


def shown(value: float) -> float | str:
    return str(value) if not math.isfinite(value) else value


def content(place: Store, table: str = "table3") -> dict[str, Any]:
    """Everything that a reader of the view sees, without the ids that MLflow draws."""
    mlflow_client = client(place)
    mlflow_runs = runs(place, table)
    names = {
        run.info.run_id: run.data.tags["campaign"]
        for run in mlflow_runs
        if run.data.tags["role"] == "campaign"
    }
    seen = {}
    for run in mlflow_runs:
        tags = {
            key: value
            for key, value in run.data.tags.items()
            if key not in ("mlflow.user", "mlflow.parentRunId")
        }
        parent = run.data.tags.get("mlflow.parentRunId")
        key = tags.get("run_id") or tags["campaign"]
        assert key not in seen, f"{key} is shown twice"
        history = {
            metric: [
                (m.step, m.timestamp, shown(m.value))
                for m in mlflow_client.get_metric_history(run.info.run_id, metric)
            ]
            for metric in sorted(run.data.metrics)
        }
        inputs = sorted(
            (
                i.dataset.name,
                i.dataset.digest,
                i.dataset.source,
                tuple((t.key, t.value) for t in i.tags),
            )
            for i in run.inputs.dataset_inputs
        )
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        assert folder.is_relative_to(place.root), f"artifacts of {place.root} lie in {folder}"
        artifacts = {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file()
        }
        info = (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time)
        seen[key] = {
            "info": info,
            "tags": tags,
            "parent": names.get(parent),
            "params": run.data.params,
            "metrics": history,
            "inputs": inputs,
            "artifacts": artifacts,
        }
    return seen


def test_a_view_made_cell_by_cell_equals_one_rebuilt_elsewhere(populated: Store, copied: Store):
    before = {table: content(populated, table) for table in ("table3", "table5")}
    assert rebuild(copied).cells == 3
    for table, number in (("table3", 2 + 3), ("table5", 1 + 2)):
        after = content(copied, table)
        assert before[table].keys() == after.keys() and len(after) == number
        for key, run in before[table].items():
            for part in run:
                assert run[part] == after[key][part], f"{part} of {key} in {table}"


def test_an_experiment_is_a_table_at_a_scale_and_there_is_no_empty_one(populated: Store):
    assert experiments(populated).keys() == {"table3-smoke", "table5-smoke"}
    tags = client(populated).get_experiment_by_name("table3-smoke").tags
    assert (
        "SMOKE" in tags["mlflow.note.content"]
        and tags["mlflow.experimentKind"] == "custom_model_development"
    )
    assert index.links(populated) == {
        name: saved_views.link(key) for name, key in experiments(populated).items()
    }


def test_saved_views_name_columns_that_there_are(populated: Store):
    """MLflow shows a column that no run has as an empty one, without a word."""
    seen = content(populated).values()
    columns = {f"tags.`{key}`" for run in seen for key in run["tags"]} | {
        f"metrics.`{key}`" for run in seen for key in run["metrics"]
    }
    columns |= {f"params.`{key}`" for run in seen for key in run["params"]}
    views = client(populated).get_experiment_by_name("table3-smoke").tags
    columns |= {
        "tags.`reason`",
        "metrics.`cost/tokens_per_second`",
    }  # which the runs of this test happen not to have
    for key, (name, query, order, _) in saved_views.VIEWS.items():
        view = json.loads(views[f"mlflow.sharedViewState.{key}"])
        packed = view["state"].removeprefix("deflate;")
        state = json.loads(zlib.decompress(base64.b64decode(packed)))
        assert view["name"] == name and f"viewStateShareKey={key}" in views["mlflow.note.content"]
        assert set(state["selectedColumns"]) <= columns, key
        assert (
            set(state["selectedColumns"]) <= set(state["columnOrder"]) <= set(state["columnWidths"])
        )
        listed = client(populated).search_runs(
            [experiments(populated)["table3-smoke"]], query, order_by=[order]
        )
        assert {run.data.tags["role"] for run in listed} == {query.split("'")[1]}


def test_a_cell_can_be_found_by_what_it_is_and_lies_under_its_campaign(populated: Store):
    seen = content(populated)
    done, skipped, failed, diverged = SPECS[:4]
    run = seen[done.run_id]
    expected = {
        "model": done.model.name,
        "adapter": done.adapter.name,
        "quantizer": done.quantizer.name,
        "train_on": done.train_on.name,
        "seed": "0",
        "scale": "smoke",
        "status": "done",
        "run_id": done.run_id,
        "mlflow.source.git.commit": "c" * 40,
        "role": "cell",
        "main_metric": f"{TASK} accuracy",
    }
    assert expected.items() <= run["tags"].items() and "reason" not in run["tags"]
    assert {key: expected[key] for key in projection.AXES}.items() <= run["params"].items()
    assert (
        run["parent"] == "20240101T000000Z-aaaaaa"
        and seen[failed.run_id]["parent"] == "20240102T000000Z-aaaaaa"
    )
    assert seen[failed.run_id]["tags"]["status"] == "done", "the newer result"
    assert (
        skipped.run_id not in seen and seen[diverged.run_id]["parent"] == "20240102T000000Z-aaaaaa"
    )
    assert "SMOKE" in run["tags"]["mlflow.note.content"]
    assert {"result.json", "manifest.sha256", "predictions.jsonl"} <= set(run["artifacts"])
    assert [row[0] for row in run["inputs"]] == [
        f"{DATASET}/{split}" for split in ("development", "test", "train")
    ]


def test_a_cell_of_two_tables_is_shown_in_both_and_says_so(populated: Store):
    table3, table5 = content(populated), content(populated, "table5")
    done, failed, diverged = SPECS[0], SPECS[2], SPECS[3]
    for spec in (done, diverged):
        assert table3[spec.run_id]["tags"] == table5[spec.run_id]["tags"], "the same result in both"
        assert table3[spec.run_id]["tags"]["tables"] == "table3 table5"
        assert table5[spec.run_id]["parent"] == "20240103T000000Z-aaaaaa"
    assert table3[diverged.run_id]["tags"]["status"] == "done", "made anew for the other table"
    assert table3[failed.run_id]["tags"]["tables"] == "table3" and failed.run_id not in table5
    assert index.is_shown(populated, done.run_id, "table5") and not index.is_shown(
        populated, failed.run_id, "table5"
    )


def test_why_a_cell_failed_stands_in_its_run(tmp_path: Path):
    place = open_store(tmp_path / "store")
    campaign = Campaign(place, "20240101T000000Z-aaaaaa", 1.7e9)
    view = open_view(place)
    seal_unfinished(
        SPECS[0], place, store.DIVERGED, "loss is nan in step 3", time.time(), "Traceback ..."
    )
    view.cell(SPECS[0].run_id, campaign.record(), view.campaign(campaign.record()))
    run = content(place)[SPECS[0].run_id]
    assert run["info"][1] == "FAILED" and run["tags"]["status"] == "diverged"
    assert run["tags"]["reason"] == "loss is nan in step 3"
    assert "**diverged**: loss is nan in step 3" in run["tags"]["mlflow.note.content"]
    assert "error.txt" in run["artifacts"]


def test_names_tell_runs_of_one_label_apart():
    plain = header(SPECS[0], store.DONE, None, 0.0)
    plain["spec"]["train"]["short"] = False
    variants = {
        "short": plain
        | {"spec": plain["spec"] | {"train": plain["spec"]["train"] | {"short": True}}},
        "random": plain | {"cell": plain["cell"] | {"weights": "random"}},
        "two": plain | {"cell": plain["cell"] | {"devices": 2}},
    }
    names = [projection.cell_name(result) for result in (plain, *variants.values())]
    assert names[0] == SPECS[0].label and len(set(names)) == 4
    assert (
        names[1].endswith("(short)")
        and names[2].endswith("(random weights)")
        and names[3].endswith("(2 devices)")
    )
    seed1 = plain | {"cell": plain["cell"] | {"seed": 1}, "label": SPECS[0].label[:-1] + "1"}
    assert (
        projection.configuration(seed1)
        == projection.configuration(plain)
        == SPECS[0].label[: -len("-s0")]
    )
    assert projection.configuration(variants["short"]) != projection.configuration(plain)


def test_a_campaign_carries_its_table_as_note_and_page(populated: Store):
    parent = content(populated)["20240102T000000Z-aaaaaa"]
    assert parent["info"][:2] == ("table3 smoke, 2023-11-15 22:13", "FINISHED")
    assert parent["tags"]["mlflow.note.content"] == "**Table 3 - SMOKE**\n"
    assert parent["tags"]["cells"] == "1 diverged, 2 done"
    assert set(parent["artifacts"]) == {"table/table3.md", "table/table3.json", "table/table3.html"}
    page = parent["artifacts"]["table/table3.html"].decode()
    assert (
        "&lt;b&gt;SMOKE" in page
        and "m &amp; n" in page
        and SPECS[0].run_id in page
        and "a note" in page
    )
    assert content(populated)["20240101T000000Z-aaaaaa"]["info"][1] == "FAILED", (
        "one of its cells failed"
    )


@pytest.mark.parametrize(
    ("scale", "begins"), [("smoke", "**SMOKE: "), ("open", "**OPEN: "), ("paper", "Evidence: ")]
)
def test_a_note_begins_with_what_its_scale_may_not_be_set_against(scale: str, begins: str):
    result = {"cell": {"scale": scale}, "status": "done", "scores": []}
    note = notes.cell_note(result, Path("aaaaaaaaaaaa"))
    assert note.startswith(begins)
    assert (scale == "paper") != ("never to be set against" in note)
    described = saved_views.experiment_tags("table3", scale, "1")["mlflow.note.content"]
    assert (scale == "paper") != ("never to be set against" in described)


def test_a_long_note_is_cut_between_lines_and_says_so():
    text = "".join(f"| row {number} |\n" for number in range(2000))
    note = notes.cut(text, "The rest: there")
    assert len(note) <= notes.NOTE_LIMIT and note.endswith("|\n\n(cut) The rest: there")
    assert notes.cut("short", "x") == "short"


def differences(place: Store) -> list[str]:
    """Where the numbers of the view are not those of the result files."""
    differing = []
    for run in runs(place):
        if run.data.tags["role"] == "campaign":
            continue
        result = place.result(run.data.tags["run_id"])
        assert result is not None
        loss = files.read_lines(place.run_folder(result["run_id"]) / "loss.jsonl")
        expected = {
            f"eval/{score['task']}/{score['metric']}": score["value"] for score in result["scores"]
        }
        expected |= {
            f"cost/{key}": value for key, value in result["costs"].items() if value is not None
        }
        expected |= {
            f"main/{key}": result["scores"][0][key]
            for key in ("value", "low", "high", "constant", "gain")
            if result["scores"]
        }
        seen = {
            key: value
            for key, value in run.data.metrics.items()
            if not key.startswith(("train/", "system/"))
        }
        differing += [f"{run.info.run_name}: {key}" for key in expected.keys() ^ seen.keys()]
        differing += [
            f"{run.info.run_name}: {key}"
            for key in expected.keys() & seen.keys()
            if expected[key] != seen[key]
        ]
        steps = [
            (point.step, point.value)
            for point in client(place).get_metric_history(run.info.run_id, "train/loss")
        ]
        if steps != [(row["step"], row["loss"]) for row in loss]:
            differing.append(f"{run.info.run_name}: train/loss")
    return differing


def test_the_view_shows_the_numbers_of_the_result_files(populated: Store, copied: Store):
    assert differences(populated) == []
    rebuild(copied)
    (run,) = [run for run in runs(copied) if run.data.tags.get("run_id") == SPECS[0].run_id]
    for key, value, step in (
        (f"eval/{TASK}/accuracy", 0.7501, 0),
        ("cost/invented", 1.0, 0),
        ("train/loss", 0.1, 7),
    ):
        client(copied).log_metric(run.info.run_id, key, value, step=step)
    assert len(differences(copied)) == 3, "a planted number is not found"


def test_the_largest_numbers_come_through_and_what_is_none_is_left_out(populated: Store):
    run = content(populated)[SPECS[0].run_id]
    assert "cost/tokens_per_second" not in run["metrics"]
    losses = {step: value for step, _, value in run["metrics"]["train/loss"]}
    assert losses == dict(enumerate(LOSSES, 1))
    assert len(run["metrics"]["system/process_memory_gib"]) == 3


def test_a_rebuild_in_the_process_that_holds_the_view_open_says_the_same(copied: Store):
    view = open_view(copied)  # which rebuilds what was shown from elsewhere
    before = content(copied)
    assert len(view.runs("tags.role = 'cell'")) == 5
    assert rebuild(copied).cells == 3
    assert content(copied) == before
    assert len(view.runs("tags.role = 'cell'")) == 5, "the open view reads the new file"


def test_a_campaign_that_was_killed_does_not_seem_to_run(copied: Store):
    killed = Campaign(copied, "20240104T000000Z-aaaaaa", 1.7e9 + 3 * 86400)
    view = open_view(copied)
    view.campaign(killed.record())
    assert content(copied)[killed.name]["info"][1] == "RUNNING"
    following = Campaign(copied, "20240105T000000Z-aaaaaa", 1.7e9 + 4 * 86400)
    view.campaign(following.record())
    following.status = "finished"
    view.campaign(following.record())
    before = content(copied)
    assert (
        before[killed.name]["info"][1] == "KILLED"
        and before[killed.name]["tags"]["status"] == "interrupted"
    )
    rebuild(copied)
    assert content(copied) == before


def test_a_rebuild_that_fails_leaves_the_old_view(copied: Store, monkeypatch: pytest.MonkeyPatch):
    rebuild(copied)
    before = content(copied)

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowView, "cell", fails)
    with pytest.raises(KeyboardInterrupt):
        rebuild(copied)
    monkeypatch.undo()
    assert index.is_current(copied) and content(copied) == before


def test_a_rebuild_that_was_killed_is_made_again(copied: Store):
    rebuild(copied)
    before = content(copied)
    folder = index.database(copied).parent
    entries = list(folder.iterdir())
    (folder / ".old").mkdir()
    for path in entries:
        path.rename(folder / ".old" / path.name)
    index.database(copied).write_bytes(b"half")
    assert not index.is_current(copied)
    open_view(copied)
    assert index.is_current(copied) and content(copied) == before
    assert not (folder / ".old").exists()


@pytest.mark.parametrize(
    "name", ["loss.jsonl", pytest.param("result.json", marks=pytest.mark.slow)]
)
def test_a_run_that_cannot_be_read_is_left_out_and_named(name: str, copied: Store):
    rebuild(copied)
    before = content(copied)
    run = SPECS[0].run_id
    assert run in before
    (copied.run_folder(run) / name).write_bytes(b"\xff\x00")
    made = rebuild(copied)
    after = content(copied)
    assert run not in after and after.keys() == before.keys() - {run}
    assert made.cells == 2
    assert list(made.left_out) == [run] and f"{run} cannot be read" in made.left_out[run]
    assert f"it is damaged: {name}" in made.left_out[run]


def delete_experiment(store: Store) -> None:
    client(store).delete_experiment(client(store).search_experiments()[0].experiment_id)


def change_schema(store: Store) -> None:
    with closing(sqlite3.connect(index.database(store))) as database:
        database.execute("update alembic_version set version_num = 'cc1f77228345'")
        database.commit()


def spoil(store: Store) -> None:
    index.database(store).write_bytes(bytes(range(256)) * 20)


def remove(store: Store) -> None:
    shutil.rmtree(index.database(store).parent)


UNUSABLE = {
    "deleted experiment": delete_experiment,
    "other schema": change_schema,
    "broken file": spoil,
    "removed": remove,
}


def campaign_log(store: Store) -> CampaignLog:
    plan = CampaignPlan(Selection("3"), "smoke", "asked for", Place(store), 1, (), ())
    return CampaignLog(plan, CampaignOptions())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "while_open"),
    [
        ("deleted experiment", True),
        ("other schema", False),
        ("broken file", True),
        ("broken file", False),
        ("removed", True),
    ],
)
def test_a_view_that_cannot_be_used_is_made_again(case: str, while_open: bool, copied: Store):
    rebuild(copied)
    log = campaign_log(copied)
    if while_open:
        log.write(lambda *_: None)
    UNUSABLE[case](copied)
    seal_done(SPECS[4], copied)
    run = SPECS[4].run_id
    log.record["cells"] = [{"label": "x", "run_id": run, "outcome": "ran", "status": "done"}]
    log.save()
    log.write(lambda view, parent: view.cell(run, log.record, parent))
    log.close(True)
    assert log.faults == []
    seen = content(copied)
    assert run in seen and index.is_current(copied)
    rebuild(copied)
    assert content(copied).keys() == seen.keys()


@pytest.mark.slow
def test_a_locked_view_is_made_again(copied: Store):
    rebuild(copied)
    log = campaign_log(copied)
    with closing(sqlite3.connect(index.database(copied), isolation_level=None)) as other:
        other.execute("begin exclusive")
        log.write(lambda *_: None)
    assert log.faults == [] and index.is_current(copied)


def test_a_view_that_cannot_be_made_is_one_line_and_no_more_is_tried(copied: Store):
    folder = index.database(copied).parent
    shutil.rmtree(folder)
    folder.write_text("a file")
    log = campaign_log(copied)
    for _ in range(2):
        log.write(lambda *_: None)
    (fault,) = log.faults
    assert "MLflow's view cannot be written" in fault and "record --rebuild" in fault
    assert "\n" not in fault


def test_a_full_disk_while_it_is_written_is_no_matter_of_the_view(
    copied: Store, monkeypatch: pytest.MonkeyPatch
):
    log = campaign_log(copied)

    def full(*_: object) -> None:
        raise RuntimeError("(sqlite3.OperationalError) database or disk is full")

    with pytest.raises(EnvironmentFault, match="no space left"):
        log.write(full)
    log.close(False)
    (record,) = [each for each in copied.campaigns() if each["id"] == log.record["id"]]
    assert record["status"] == "interrupted"


def test_a_view_beyond_a_quota_is_one_line_and_exit_code_3(
    copied: Store, monkeypatch: pytest.MonkeyPatch
):
    """SQLite calls it a disk I/O error; the disk may be failing as well."""

    def fail(*_: object) -> None:
        raise RuntimeError("(sqlite3.OperationalError) disk I/O error\n[SQL: INSERT INTO runs")

    monkeypatch.setattr(MlflowView, "campaign", fail)
    with pytest.raises(EnvironmentFault, match="its quota is used up") as refused:
        check_store(copied, rebuild=True)
    assert refused.value.exit_code == 3
    one_line(refused.value)
    log = campaign_log(copied)
    log.write(lambda *_: None)
    (fault,) = log.faults
    assert "its quota is used up" in fault


@pytest.mark.parametrize("name", ["a?b", "a%20b", "a#b", "50 % \u00fc"])
def test_the_database_lies_in_the_store_whatever_its_name(name: str, tmp_path: Path):
    place = open_store(tmp_path / name)
    seal_done(SPECS[0], place)
    view = open_view(place)
    campaign = Campaign(place, "20240101T000000Z-aaaaaa", 1.7e9)
    view.cell(SPECS[0].run_id, campaign.record(), view.campaign(campaign.record()))
    assert index.database(place).is_file() and index.is_current(place)
    assert {path.name for path in tmp_path.iterdir()} == {name}
    (run,) = view.runs("tags.role = 'cell'")
    artifacts = [item.path for item in view.client.list_artifacts(run.info.run_id)]
    assert "result.json" in artifacts


def test_showing_a_cell_twice_adds_nothing(copied: Store):
    rebuild(copied)
    before = content(copied)
    view = open_view(copied)
    for campaign in copied.campaigns():
        parent = view.campaign(campaign)
        for cell in campaign["cells"]:
            if cell["outcome"] != "kept":
                view.cell(cell["run_id"], campaign, parent)
    assert content(copied) == before


def test_a_cell_that_was_shown_in_part_is_shown_again_whole(copied: Store):
    rebuild(copied)
    before = content(copied)
    spec = SPECS[0]
    (run,) = [run for run in runs(copied) if run.data.tags.get("run_id") == spec.run_id]
    client(copied).delete_tag(
        run.info.run_id, "result_digest"
    )  # the last thing that is written of a cell
    campaign = copied.campaigns()[0]
    view = open_view(copied)
    view.cell(spec.run_id, campaign, view.campaign(campaign))
    assert content(copied) == before


def test_a_moved_store_is_shown_from_where_it_lies(copied: Store, populated: Store):
    untouched = {
        path: path.stat().st_mtime_ns
        for path in (populated.root / "mlruns").rglob("*")
        if "artifacts" in path.parts
    }
    campaign = Campaign(copied, "20240104T000000Z-aaaaaa", 1.7e9 + 3 * 86400)
    view = open_view(copied)
    parent = view.campaign(campaign.record())
    seal_done(SPECS[4], copied)
    campaign.note(SPECS[4], "ran", "done")
    view.cell(SPECS[4].run_id, campaign.record(), parent)
    campaign.status = "finished"
    view.campaign(campaign.record())
    seen = content(copied)  # which checks where the artifacts lie
    assert seen[SPECS[4].run_id]["artifacts"] and len(seen) == 3 + 4
    shutil.copytree(copied.root, copied.root.with_name("again"))
    again = open_store(copied.root.with_name("again"))
    rebuild(again)
    assert content(again) == seen
    now = {
        path: path.stat().st_mtime_ns
        for path in (populated.root / "mlruns").rglob("*")
        if "artifacts" in path.parts
    }
    assert now == untouched, "the view of the moved store wrote into the old place"


def test_planted_files_of_another_backend_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = open_store(tmp_path / "store")
    planted = [folder / "mlruns" / "0" / "meta.yaml" for folder in (place.root, tmp_path)]
    for path in planted:
        path.parent.mkdir(parents=True)
        path.write_text(
            "experiment_id: '0'\nname: Default\nartifact_location: /nowhere\n"
            "lifecycle_stage: active\n"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "elsewhere"))
    campaign = Campaign(place, "20240101T000000Z-aaaaaa", 1.7e9)
    view = open_view(place)
    parent = view.campaign(campaign.record())
    seal_unfinished(SPECS[0], place, store.FAILED, "no reason", time.time())
    view.cell(SPECS[0].run_id, campaign.record(), parent)
    assert index.database(place).read_bytes()[:15] == b"SQLite format 3"
    assert content(place)[SPECS[0].run_id]["tags"]["status"] == "failed"
    assert sorted(tmp_path.glob("mlruns/**/*")) == [
        tmp_path / "mlruns" / "0",
        tmp_path / "mlruns" / "0" / "meta.yaml",
    ]
    assert not (tmp_path / "elsewhere").exists()


REBUILD = """
import sys
from pathlib import Path
from finrepro.evidence import store
from finrepro.tracking.rebuilding import open_view, rebuild
from finrepro.tracking.view import MlflowView
place = store.open_store(Path(sys.argv[1]))
print(rebuild(place).cells)
view = open_view(place)
for run in view.runs("tags.status = 'done'"):
    print(run.data.tags["mlflow.source.git.commit"])
"""


@pytest.mark.slow
def test_the_commit_is_shown_where_there_is_no_git(copied: Store):
    answer = python("-W", "ignore", "-c", REBUILD, str(copied.root), PATH=str(copied.root))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == ["3"] + ["c" * 40] * 5
    assert "git" not in answer.stderr.lower()


BLOCKED = """
import sys
sys.modules["mlflow"] = None
from invoke import Program
Program().run(["invoke", *sys.argv[1:]])
"""


def test_without_mlflow_one_line_says_so_and_nothing_is_lost(copied: Store):
    before = {
        path: path.read_bytes()
        for path in copied.root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    for command in (["record", "--rebuild"], ["ui"]):
        answer = python("-c", BLOCKED, *command, "--store", str(copied.root))
        assert answer.returncode == EnvironmentFault.exit_code, answer.stderr
        (line,) = answer.stderr.splitlines()
        assert "the package mlflow is missing" in line and "record --rebuild" in line
    after = {
        path: path.read_bytes()
        for path in copied.root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert after == before


def test_a_damaged_record_of_a_campaign_is_one_line(copied: Store):
    from fixtures.process import one_line

    path = copied.results / "campaigns" / "20240101T000000Z-aaaaaa.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(EnvironmentFault) as refused:
        rebuild(copied)
    assert str(path) in one_line(refused.value)


def test_the_evidence_is_not_touched_by_a_rebuild(copied: Store):
    def evidence() -> dict[str, bytes]:
        return {
            p.relative_to(copied.root).as_posix(): p.read_bytes()
            for p in copied.results.rglob("*")
            if p.is_file() and copied.cache not in p.parents
        }

    before = evidence()
    rebuild(copied)
    assert evidence() == before
    for folder in (copied.results / "runs").iterdir():
        assert damaged_files(folder) == []


def test_mlflow_itself_says_that_it_sends_nothing(populated: Store):
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()
