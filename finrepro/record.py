"""MLflow's view of the store: made from results/ by one function, after each cell and by a rebuild alike.

The evidence is the files; this is the window. Nothing is written here that cannot be made again, and this is the only importer of mlflow.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finrepro import runtime
from finrepro.store import DONE, SKIPPED, Store, disk_errors, read_lines, write_json

ARTIFACTS = ("result.json", "predictions.jsonl", "manifest.sha256", "error.txt")
BATCH = 1000  # MLflow's limit of metrics a call
STATUS = {DONE: "FINISHED", SKIPPED: "KILLED"}  # everything else is FAILED


def database(store: Store) -> Path:
    """MLflow's SQLite file."""
    return store.root / "mlruns" / "mlflow.db"


def tracking_uri(store: Store) -> str:
    """The explicit address of the view; MLflow's own default depends on what lies in the working directory."""
    return f"sqlite:///{database(store)}"


def _digest(store: Store, run_id: str) -> str:
    """What identifies a result: sha256 of its result.json, shortened to what a tag holds."""
    return hashlib.sha256((store.run_folder(run_id) / "result.json").read_bytes()).hexdigest()[:32]


def _shown(store: Store) -> dict[str, str]:
    """Run id -> digest of the result that the view shows; under `store`, where the store lay."""
    try:
        return dict(json.loads((database(store).parent / "shown.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def is_shown(store: Store, run_id: str) -> bool:
    """Whether the view shows the run's current result; answered without loading MLflow."""
    return database(store).is_file() and _shown(store).get(run_id) == _digest(store, run_id)


def is_current(store: Store) -> bool:
    """Whether there is a view, made where the store lies now: MLflow keeps absolute paths."""
    return database(store).is_file() and _shown(store).get("store") == str(store.root)


class View:
    """MLflow's database of a store, opened by the one process that holds the store's lock; created if it is not there."""

    def __init__(self, store: Store) -> None:
        os.environ |= runtime.OFFLINE | {"GIT_PYTHON_REFRESH": "quiet", "MLFLOW_TRACKING_URI": tracking_uri(store)}
        os.environ["MLFLOW_LOGGING_LEVEL"] = "CRITICAL"  # no notices, no traceback of an error that it raises as well
        from mlflow.tracking import MlflowClient

        if database(store).is_file() and not is_current(store):
            rebuild(store)
        self.store = store
        with disk_errors(store.root):
            database(store).parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=tracking_uri(store))

    def experiment(self, table: str) -> str:
        """The id of the table's experiment."""
        found = self.client.get_experiment_by_name(table)
        if found is not None:
            return str(found.experiment_id)
        note = f"Runs of {table}. A parent run is a campaign, its children are cells. The evidence lies in results/runs/<run_id>/."
        return str(
            self.client.create_experiment(
                table,
                artifact_location=(database(self.store).parent / "artifacts" / table).as_uri(),
                tags={"mlflow.note.content": note},
            )
        )

    def find(self, experiment: str, **tags: str) -> Any | None:
        """The run that carries these tags, None if there is none."""
        text = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self.client.search_runs([experiment], text, max_results=1)
        return found[0] if found else None

    def campaign(self, campaign: dict[str, Any]) -> str:
        """The parent run of a campaign, brought up to date with it; its MLflow id."""
        experiment = self.experiment(campaign["table"])
        found = self.find(experiment, campaign=campaign["id"], role="campaign")
        parent = found or self.client.create_run(
            experiment,
            start_time=_milliseconds(campaign["started"]),
            run_name=f"{campaign['table']} {campaign['scale']} {campaign['id']}",
            tags={
                "campaign": campaign["id"],
                "role": "campaign",
                "table": campaign["table"],
                "scale": campaign["scale"],
            },
        )
        run_id = str(parent.info.run_id)
        tags = {"status": campaign["status"], "command": campaign["command"], **_git_tags(campaign["environment"])}
        for key, value in tags.items():
            self.client.set_tag(run_id, key, value)
        folder = self.store.results / "tables" / campaign["scale"]
        for path in sorted(folder.glob(f"{campaign['rendered']}.*")) if campaign["status"] != "running" else []:
            self.client.log_artifact(run_id, str(path), "table")
            if path.suffix == ".md":
                self.client.set_tag(run_id, "mlflow.note.content", path.read_text(encoding="utf-8")[:7900])
        if campaign["status"] != "running":
            status = "FINISHED" if campaign["status"] == "finished" else "FAILED"
            self.client.set_terminated(run_id, status, _milliseconds(campaign["ended"]))
        return run_id

    def cell(self, run_id: str, campaign: dict[str, Any], parent: str) -> None:
        """The child run of a cell's current result. Once projected, it is left alone; an older result of the cell is removed."""
        folder = self.store.run_folder(run_id)
        result = self.store.result(run_id)
        if result is None:
            return
        digest = _digest(self.store, run_id)
        experiment = self.experiment(campaign["table"])
        if self.find(experiment, run_id=run_id, result_digest=digest, status=result["status"]):
            self._note_shown(run_id, digest)
            return
        older = self.find(experiment, run_id=run_id)
        if older is not None:
            self.client.delete_run(older.info.run_id)
        tags = {
            **{key: str(value) for key, value in result["cell"].items()},
            "table": campaign["table"], "run_id": run_id, "role": "cell", "mlflow.parentRunId": parent,
            "mlflow.note.content": _note(result, folder), "reason": result["reason"] or "", **_git_tags(result["environment"]),
        }  # fmt: skip
        run = self.client.create_run(experiment, _milliseconds(result["started"]), tags, result["label"])
        self._fill(run.info.run_id, result, folder)
        self.client.set_terminated(
            run.info.run_id, STATUS.get(result["status"], "FAILED"), _milliseconds(result["ended"])
        )
        # Last, so that a projection cut short is not taken for a whole one and is made again.
        self.client.set_tag(run.info.run_id, "status", result["status"])
        self.client.set_tag(run.info.run_id, "result_digest", digest)
        self._note_shown(run_id, digest)

    def _note_shown(self, run_id: str, digest: str) -> None:
        shown = _shown(self.store) | {"store": str(self.store.root), run_id: digest}
        write_json(database(self.store).parent / "shown.json", shown)

    def _fill(self, mlflow_id: str, result: dict[str, Any], folder: Path) -> None:
        """Parameters, metrics, datasets and artifacts of a run."""
        from mlflow.entities import Param

        params = [Param(key, str(value)[:6000]) for key, value in sorted(_parameters(result).items())]
        self.client.log_batch(mlflow_id, params=params[:100])
        metrics = list(_metrics(result, folder))
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(mlflow_id, metrics=metrics[start : start + BATCH])
        self.client.log_inputs(mlflow_id, _datasets(result))
        for name in ARTIFACTS:
            if (folder / name).is_file():
                self.client.log_artifact(mlflow_id, str(folder / name))


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _git_tags(environment: dict[str, Any]) -> dict[str, str]:
    commit = environment["git_commit"] or "unknown"
    dirty = str(environment["git_dirty"]).lower()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "mlflow.source.git.commit": commit,
        "mlflow.source.name": "finrepro",
    }


def _parameters(result: dict[str, Any]) -> dict[str, Any]:
    """Few, stable keys; the whole spec is in result.json."""
    spec = result["spec"]
    parameters = {key: value for key, value in spec["train"].items() if key != "optimizer"}
    parameters |= {f"optimizer.{key}": value for key, value in spec["train"]["optimizer"].items()}
    for part in ("adapter", "quantizer"):
        parameters |= {f"{part}.{key}": value for key, value in spec[part].items()}
    parameters |= {
        key: spec[key] for key in ("base_run", "base_checkpoint", "seed", "threads", "world_size", "weights")
    }
    return parameters | {"dtype": spec["model"]["dtype"], "family": spec["model"]["family"]}


def _metrics(result: dict[str, Any], folder: Path) -> Iterator[Any]:
    """Scores with their bounds, costs, the loss of every step, and what the process used."""
    from mlflow.entities import Metric

    end = _milliseconds(result["ended"])
    for score in result["scores"]:
        for field in ("value", "low", "high", "constant"):
            if score[field] is not None:
                suffix = "" if field == "value" else f"/{field}"
                yield Metric(f"eval/{score['task']}/{score['metric']}{suffix}", score[field], end, 0)
    for name, value in result["costs"].items():
        if value is not None:
            yield Metric(f"cost/{name}", value, end, 0)
    start = result["started"]
    for row in read_lines(folder / "loss.jsonl"):
        for field in ("loss", "grad_norm", "lr"):
            yield Metric(f"train/{field}", row[field], _milliseconds(start + row["seconds"]), row["step"])
    for step, row in enumerate(read_lines(folder / "system.jsonl")):
        for name, value in row.items():
            if name != "time":
                yield Metric(f"system/{name}", value, _milliseconds(row["time"]), step)


def _datasets(result: dict[str, Any]) -> list[Any]:
    """The splits as dataset inputs, with the fingerprint of their examples: MLflow's own digest sees the first rows only."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for split, fingerprint in result["data"].get("fingerprints", {}).items():
        source = json.dumps({"files": result["data"]["files"], "fingerprint": fingerprint})
        name = f"{result['spec']['train_on']['task']['dataset']}/{split}"
        dataset = Dataset(name=name, digest=fingerprint[:32], source_type="sha256", source=source)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", split)]))
    return inputs


def _note(result: dict[str, Any], folder: Path) -> str:
    """What a reviewer reads first in a run."""
    smoke = "**SMOKE: a miniature; never to be set against published values.**\n\n" * (
        result["cell"]["scale"] == "smoke"
    )
    head = f"{smoke}`{result['label']}` - {result['status']}" + (f": {result['reason']}" if result["reason"] else "")
    rows = [
        f"| {s['task']} | {s['metric']} | {s['value']:.4f} [{s['low']:.4f}, {s['high']:.4f}] | "
        f"{'' if s['constant'] is None else format(s['constant'], '.4f')} |"
        for s in result["scores"]
    ]
    table = (
        ["", "| task | metric | value [95 % interval] | best constant |", "|---|---|---|---|", *rows] if rows else []
    )
    return "\n".join([head, *table, "", f"Evidence: results/runs/{folder.name}/ (`sha256sum -c manifest.sha256`)"])


def rebuild(store: Store) -> int:
    """Throw the view away and make it again from results/; the number of cells in it."""
    campaigns = store.campaigns()
    shutil.rmtree(database(store).parent, ignore_errors=True)
    view = View(store)
    owner = {cell["run_id"]: each["id"] for each in campaigns for cell in each["cells"] if cell["outcome"] != "kept"}
    for campaign in campaigns:
        parent = view.campaign(campaign)
        for cell in campaign["cells"]:
            if owner.get(cell["run_id"]) == campaign["id"]:
                view.cell(cell["run_id"], campaign, parent)
    return len(owner)
