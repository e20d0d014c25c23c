"""MLflow's view of the store: made from results/ by one function, after each cell and by a rebuild
alike.

The evidence is the files; this is the window. Nothing is written here that cannot be made again,
and this is the only importer of mlflow. An experiment is a table at one scale, a parent run a
campaign, a child a cell. A cell of two tables is a child in both, and its tag `tables` names both.
A skipped cell is no run: the table says why it was skipped.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from finrepro.errors import EnvironmentFault
from finrepro.evidence.files import disk_errors, write_json
from finrepro.evidence.store import DONE, SKIPPED, Store
from finrepro.runtime import process
from finrepro.tracking import projection

LAYOUT = 2  # of the view; a view of another layout is made anew
ARTIFACTS = ("result.json", "predictions.jsonl", "manifest.sha256", "error.txt")
BATCH = 1000  # MLflow's limit of metrics a call
CAMPAIGN_STATUS = {"finished": "FINISHED", "interrupted": "KILLED"}  # everything else is FAILED


def database(store: Store) -> Path:
    """MLflow's SQLite file."""
    return store.root / "mlruns" / "mlflow.db"


def tracking_uri(store: Store) -> str:
    """The explicit address of the view; MLflow's own default depends on what lies in the working
    directory.
    """
    return f"sqlite:///{database(store)}"


def _digest(store: Store, run_id: str) -> str:
    """What identifies a result: sha256 of its result.json, shortened to what a tag holds."""
    return hashlib.sha256((store.run_folder(run_id) / "result.json").read_bytes()).hexdigest()[:32]


def _shown(store: Store) -> dict[str, Any]:
    """What the view shows: `cells` (run id -> table -> digest), `experiments` (name -> id), its
    layout and where the store lay.
    """
    empty = {"store": str(store.root), "layout": LAYOUT, "experiments": {}, "cells": {}}
    try:
        found = json.loads((database(store).parent / "shown.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return empty | {"layout": None}
    return empty | {"layout": None} | (found if isinstance(found, dict) else {})


def is_shown(store: Store, run_id: str, table: str) -> bool:
    """Whether the view shows the run's current result among those of `table`; answered without
    loading MLflow.
    """
    return is_current(store) and _shown(store)["cells"].get(run_id, {}).get(table) == _digest(
        store, run_id
    )


def is_current(store: Store) -> bool:
    """Whether there is a view of this layout, made where the store lies now: MLflow keeps
    absolute paths.
    """
    shown = _shown(store)
    return database(store).is_file() and (shown["store"], shown["layout"]) == (
        str(store.root),
        LAYOUT,
    )


def links(store: Store) -> dict[str, str]:
    """Experiment -> its results below the address of MLflow's server."""
    return {
        name: projection.link(key) for name, key in sorted(_shown(store)["experiments"].items())
    }


def environment(store: Store) -> dict[str, str]:
    """Environment variables of a process that opens the view: no telemetry, no notices, and no
    connection kept to a file made anew.
    """
    return process.OFFLINE | {
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_TRACKING_URI": tracking_uri(store),
        "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    }


def load_mlflow(store: Store) -> Any:
    """The `mlflow` package, set up for the store. Raises `EnvironmentFault` if it is not
    installed.
    """
    # No notices, no traceback of an error that it raises as well.
    os.environ |= environment(store) | {"MLFLOW_LOGGING_LEVEL": "CRITICAL"}
    try:
        import mlflow
        import mlflow.store.tracking.sqlalchemy_store
        import mlflow.tracking
    except ImportError as error:
        raise EnvironmentFault(
            f"the package mlflow is missing: {error}. Install the locked packages with ./run; results are kept, "
            "and `invoke record --rebuild` shows them then."
        ) from None
    return mlflow


class View:
    """MLflow's database of a store, opened by the one process that holds the store's lock; created
    if it is not there.

    Raises `EnvironmentFault` if mlflow is not installed or the disk is full or refused.
    """

    def __init__(self, store: Store) -> None:
        mlflow = load_mlflow(store)
        if database(store).is_file() and not is_current(store):
            rebuild(store)
        self.store = store
        with disk_errors(store.root):
            database(store).parent.mkdir(parents=True, exist_ok=True)
            # MLflow keeps one object an address as long as the process lives, and would not make
            # the tables of a new file.
            mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore(
                tracking_uri(store), self._artifacts("default")
            )
            self.client = mlflow.tracking.MlflowClient(tracking_uri=tracking_uri(store))
            if not is_current(store):
                write_json(
                    database(store).parent / "shown.json", _shown(store) | {"layout": LAYOUT}
                )
                self.client.delete_experiment("0")  # MLflow's empty "Default"

    def _artifacts(self, experiment: str) -> str:
        return (database(self.store).parent / "artifacts" / experiment).as_uri()

    def _note_shown(self, **changes: Any) -> None:
        write_json(database(self.store).parent / "shown.json", _shown(self.store) | changes)

    def experiment(self, table: str, scale: str) -> str:
        """The id of the experiment of the table at this scale."""
        name, known = f"{table}-{scale}", _shown(self.store)["experiments"]
        if name not in known:
            experiment = str(
                self.client.create_experiment(name, artifact_location=self._artifacts(name))
            )
            for key, value in projection.experiment_tags(table, scale, experiment).items():
                self.client.set_experiment_tag(experiment, key, value)
            known = known | {name: experiment}
            self._note_shown(experiments=known)
        return str(known[name])

    def runs(self, query: str) -> list[Any]:
        """Every run, of whichever experiment, that the query finds."""
        experiments = [*_shown(self.store)["experiments"].values()]
        return list(self.client.search_runs(experiments, query)) if experiments else []

    def _close_abandoned(self, current: str = "") -> None:
        """Mark campaigns as interrupted that still seem to run: who holds the store's lock is
        alone.
        """
        for run in self.runs("tags.role = 'campaign' and tags.status = 'running'"):
            if run.data.tags["campaign"] != current:
                self.client.set_tag(run.info.run_id, "status", "interrupted")
                self.client.set_terminated(run.info.run_id, "KILLED", run.info.start_time)

    def campaign(self, campaign: dict[str, Any]) -> str:
        """The parent run of a campaign, brought up to date with it; its MLflow id."""
        experiment = self.experiment(campaign["table"], campaign["scale"])
        self._close_abandoned(campaign["id"])
        found = self.runs(f"tags.role = 'campaign' and tags.campaign = '{campaign['id']}'")
        parent = next(
            (run for run in found if run.info.experiment_id == experiment), None
        ) or self.client.create_run(
            experiment,
            projection.milliseconds(campaign["started"]),
            run_name=projection.campaign_name(campaign),
        )
        run_id = str(parent.info.run_id)
        for key, value in projection.campaign_tags(campaign).items():
            self.client.set_tag(run_id, key, value)
        if campaign["status"] == "running":
            self.client.update_run(run_id, "RUNNING")
            return run_id
        self._table(run_id, self.store.results / "tables" / campaign["scale"], campaign["rendered"])
        status = CAMPAIGN_STATUS.get(campaign["status"], "FAILED")
        self.client.set_terminated(run_id, status, projection.milliseconds(campaign["ended"]))
        return run_id

    def _table(self, mlflow_id: str, folder: Path, stem: str) -> None:
        """The table's files as artifacts, with a page that MLflow shows; its Markdown as the
        run's note.
        """
        for path in sorted(folder.glob(f"{stem}.*")):
            self.client.log_artifact(mlflow_id, str(path), "table")
            if path.suffix == ".md":
                text = projection.cut(
                    path.read_text(encoding="utf-8"),
                    f"The whole table: Artifacts, table/{stem}.html",
                )
                self.client.set_tag(mlflow_id, "mlflow.note.content", text)
            if path.suffix == ".json":
                page = projection.table_html(json.loads(path.read_text(encoding="utf-8")))
                self.client.log_text(mlflow_id, page, f"table/{stem}.html")

    def cell(self, run_id: str, campaign: dict[str, Any], parent: str) -> None:
        """The child run of a cell's current result, in this campaign's experiment and in every
        other that shows the cell.

        Once projected, a result is left alone; an older result of the cell is removed.
        """
        result = self.store.result(run_id)
        if result is None or result["status"] == SKIPPED:
            return
        digest = _digest(self.store, run_id)
        here = self.experiment(campaign["table"], campaign["scale"])
        before = {
            str(run.info.experiment_id): run for run in self.runs(f"tags.run_id = '{run_id}'")
        }
        homes = {key: run.data.tags["mlflow.parentRunId"] for key, run in before.items()} | {
            here: parent
        }
        table_of = {
            key: name.rpartition("-")[0] for name, key in _shown(self.store)["experiments"].items()
        }
        tables = sorted(table_of[key] for key in homes)
        for experiment, home in homes.items():
            older = before.get(experiment)
            if older is None or older.data.tags.get("result_digest") != digest:
                if older is not None:
                    self.client.delete_run(older.info.run_id)
                self._project(
                    result,
                    experiment,
                    {"mlflow.parentRunId": home, "tables": " ".join(tables)},
                    digest,
                )
            elif older.data.tags.get("tables") != " ".join(tables):
                self.client.set_tag(older.info.run_id, "tables", " ".join(tables))
        shown = _shown(self.store)["cells"] | {run_id: dict.fromkeys(tables, digest)}
        self._note_shown(cells=shown)

    def _project(
        self, result: dict[str, Any], experiment: str, tags: dict[str, str], digest: str
    ) -> None:
        """A run made from a result: its tags, parameters, metrics, datasets and artifacts."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

        folder = self.store.run_folder(result["run_id"])
        tags = {
            **projection.cell_tags(result),
            **tags,
            "mlflow.note.content": projection.cell_note(result, folder),
        }
        started, name = projection.milliseconds(result["started"]), projection.cell_name(result)
        run_id = self.client.create_run(experiment, started, tags, name).info.run_id
        self.client.log_batch(
            run_id, params=[Param(*pair) for pair in projection.parameters(result).items()]
        )
        metrics = [Metric(*point) for point in projection.metrics(result, folder)]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        inputs = [
            DatasetInput(
                Dataset(dataset, key, "sha256", source), [InputTag("mlflow.data.context", context)]
            )
            for dataset, key, source, context in projection.datasets(result)
        ]
        self.client.log_inputs(run_id, inputs)
        for artifact in ARTIFACTS:
            if (folder / artifact).is_file():
                self.client.log_artifact(run_id, str(folder / artifact))
        status = "FINISHED" if result["status"] == DONE else "FAILED"
        self.client.set_terminated(run_id, status, projection.milliseconds(result["ended"]))
        # Last, so that a projection cut short is not taken for a whole one and is made again.
        self.client.set_tag(run_id, "status", result["status"])
        self.client.set_tag(run_id, "result_digest", digest)


def rebuild(store: Store) -> int:
    """Throw the view away and make it again from results/; the number of cells in it. Raises as
    `View` does.
    """
    campaigns = store.campaigns()
    load_mlflow(store)  # before anything is thrown away
    shutil.rmtree(database(store).parent, ignore_errors=True)
    view = View(store)
    view._note_shown(layout=None)  # until it is whole: a rebuild that was cut short is made again
    owner = {
        (campaign["table"], campaign["scale"], cell["run_id"]): campaign["id"]
        for campaign in campaigns
        for cell in campaign["cells"]
        if cell["outcome"] not in ("kept", "skipped")
    }
    for campaign in campaigns:
        parent = view.campaign(campaign)
        for cell in campaign["cells"]:
            if owner.get((campaign["table"], campaign["scale"], cell["run_id"])) == campaign["id"]:
                view.cell(cell["run_id"], campaign, parent)
    view._close_abandoned()
    view._note_shown(layout=LAYOUT)
    return len(_shown(store)["cells"])
