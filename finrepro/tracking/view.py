"""MLflow's view of the store: made from results/ by one function, after each cell and by a rebuild
alike.

The evidence is the files; this is the window. Nothing is written here that cannot be made again.
An experiment is a table at one scale, a parent run a campaign, a child a cell. A cell of two tables
is a child in both, and its tag `tables` names both. A skipped cell is no run: the table says why it
was skipped.
"""

from pathlib import Path
from typing import Any

from finrepro import bounds
from finrepro.evidence.files import disk_errors
from finrepro.evidence.store import DONE, Store
from finrepro.runtime.interrupts import held_back
from finrepro.tracking import notes, projection
from finrepro.tracking.index import (
    LAYOUT,
    database,
    is_current,
    read_index,
    schema_version,
    tracking_uri,
    update_index,
)
from finrepro.tracking.library import load_mlflow
from finrepro.tracking.projected import Projected, project
from finrepro.tracking.saved_views import experiment_tags

ARTIFACTS = ("result.json", "predictions.jsonl", "manifest.sha256", "error.txt")
BATCH = 1000  # MLflow's limit of metrics a call
CAMPAIGN_STATUS = {"finished": "FINISHED", "interrupted": "KILLED"}  # everything else is FAILED


class MlflowView:
    """MLflow's database of a store, opened by the one process that holds the store's lock; created
    if it is not there. `rebuilding.open_view` makes one anew that cannot be opened.

    Interrupts wait for what is being written: in a callback of MLflow's database one would be lost.
    Raises `EnvironmentFault` if mlflow is not installed or the disk is full or refused.
    """

    @held_back()
    def __init__(self, store: Store) -> None:
        mlflow = load_mlflow(store)
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
                update_index(store, layout=LAYOUT, schema=schema_version(store))
                self.client.delete_experiment("0")  # MLflow's empty "Default"

    def _artifacts(self, experiment: str) -> str:
        return (database(self.store).parent / "artifacts" / experiment).as_uri()

    def experiment(self, table: str, scale: str) -> str:
        """The id of the experiment of the table at this scale."""
        name, experiments = f"{table}-{scale}", read_index(self.store)["experiments"]
        if name not in experiments:
            experiment = str(
                self.client.create_experiment(name, artifact_location=self._artifacts(name))
            )
            for key, value in experiment_tags(table, scale, experiment).items():
                self.client.set_experiment_tag(experiment, key, value)
            experiments = experiments | {name: experiment}
            update_index(self.store, experiments=experiments)
        return str(experiments[name])

    def runs(self, query: str) -> list[Any]:
        """MLflow's runs of every experiment that match the query."""
        experiments = [*read_index(self.store)["experiments"].values()]
        return list(self.client.search_runs(experiments, query)) if experiments else []

    def close_abandoned(self, current: str = "") -> None:
        """Mark campaigns that still seem to run, but for `current`, as interrupted: the holder of
        the store's lock is alone.
        """
        for run in self.runs("tags.role = 'campaign' and tags.status = 'running'"):
            if run.data.tags["campaign"] != current:
                self.client.set_tag(run.info.run_id, "status", "interrupted")
                self.client.set_terminated(run.info.run_id, "KILLED", run.info.start_time)

    @held_back()
    def campaign(self, campaign: dict[str, Any]) -> str:
        """The parent run of a campaign, brought up to date with its record; its MLflow id."""
        experiment = self.experiment(campaign["table"], campaign["scale"])
        self.close_abandoned(campaign["id"])
        run_id = self._parent(campaign, experiment)
        for key, value in projection.campaign_tags(campaign).items():
            self.client.set_tag(run_id, key, value)
        if campaign["status"] == "running":
            self.client.update_run(run_id, "RUNNING")
            return run_id
        self._table(run_id, self.store.results / "tables" / campaign["scale"], campaign["rendered"])
        status = CAMPAIGN_STATUS.get(campaign["status"], "FAILED")
        self.client.set_terminated(run_id, status, projection.milliseconds(campaign["ended"]))
        return run_id

    def _parent(self, campaign: dict[str, Any], experiment: str) -> str:
        """The MLflow id of a campaign's run in the experiment, created if it is not there."""
        for run in self.runs(f"tags.role = 'campaign' and tags.campaign = '{campaign['id']}'"):
            if run.info.experiment_id == experiment:
                return str(run.info.run_id)
        started = projection.milliseconds(campaign["started"])
        name = projection.campaign_name(campaign)
        return str(self.client.create_run(experiment, started, run_name=name).info.run_id)

    def _table(self, mlflow_id: str, folder: Path, stem: str) -> None:
        """The table's files as artifacts, with a page that MLflow shows; its Markdown as the
        run's note.
        """
        for path in sorted(folder.glob(f"{stem}.*")):
            self.client.log_artifact(mlflow_id, str(path), "table")
            if path.suffix == ".md":
                note = notes.cut(
                    path.read_text(encoding="utf-8"),
                    f"The whole table: Artifacts, table/{stem}.html",
                )
                self.client.set_tag(mlflow_id, "mlflow.note.content", note)
            if path.suffix == ".json":
                page = notes.table_html(bounds.read_json(path))
                self.client.log_text(mlflow_id, page, f"table/{stem}.html")

    @held_back()
    def cell(self, run_id: str, campaign: dict[str, Any], parent: str) -> None:
        """The child run of a cell's current result, in this campaign's experiment and in every
        other that shows the cell.

        A result that is shown already is left alone; an older result of the cell is removed.
        Raises `Unreadable`, before anything is changed.
        """
        projected = project(self.store, run_id)
        if projected is None:
            return
        digest = projected.digest
        runs_by_experiment = {
            str(run.info.experiment_id): run for run in self.runs(f"tags.run_id = '{run_id}'")
        }
        parents = {
            key: run.data.tags["mlflow.parentRunId"] for key, run in runs_by_experiment.items()
        }
        parents |= {self.experiment(campaign["table"], campaign["scale"]): parent}
        tables = self._tables(parents)
        for experiment, mlflow_parent in parents.items():
            tags = {"mlflow.parentRunId": mlflow_parent, "tables": " ".join(tables)}
            run = runs_by_experiment.get(experiment)
            if run is None or run.data.tags.get("result_digest") != digest:
                if run is not None:
                    self.client.delete_run(run.info.run_id)
                self._project(projected, experiment, tags)
            elif run.data.tags.get("tables") != tags["tables"]:
                self.client.set_tag(run.info.run_id, "tables", tags["tables"])
        cells = read_index(self.store)["cells"] | {run_id: dict.fromkeys(tables, digest)}
        update_index(self.store, cells=cells)

    def _tables(self, experiments: dict[str, str]) -> list[str]:
        """The tables of experiments, given by id."""
        index = read_index(self.store)["experiments"]
        return sorted(name.rpartition("-")[0] for name, key in index.items() if key in experiments)

    def _project(self, cell: Projected, experiment: str, tags: dict[str, str]) -> None:
        """A run made from a result: its tags, parameters, metrics, datasets and artifacts."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

        started = projection.milliseconds(cell.result["started"])
        run = self.client.create_run(experiment, started, cell.tags | tags, cell.name)
        run_id = run.info.run_id
        self.client.log_batch(run_id, params=[Param(*pair) for pair in cell.parameters.items()])
        metrics = [Metric(*point) for point in cell.metrics]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        inputs = [
            DatasetInput(
                Dataset(dataset, key, "sha256", source), [InputTag("mlflow.data.context", context)]
            )
            for dataset, key, source, context in cell.datasets
        ]
        self.client.log_inputs(run_id, inputs)
        for artifact in ARTIFACTS:
            if (cell.folder / artifact).is_file():
                self.client.log_artifact(run_id, str(cell.folder / artifact))
        status = "FINISHED" if cell.result["status"] == DONE else "FAILED"
        ended = projection.milliseconds(cell.result["ended"])
        self.client.set_terminated(run_id, status, ended)
        # Last, so that a projection cut short is not taken for a whole one and is made again.
        self.client.set_tag(run_id, "status", cell.result["status"])
        self.client.set_tag(run_id, "result_digest", cell.digest)
