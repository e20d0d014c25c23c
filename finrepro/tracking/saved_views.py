"""Saved views of an experiment: which runs MLflow's page lists, sorted how, with which columns.

MLflow's public interface saves no view, so these are written as its own page writes them: a tag
with a packed state. The format is private and was read from MLflow 3.17.2, which the lock pins; a
view that another version does not know shows as its default, and nothing else depends on it.
"""

import base64
import zlib

from finrepro import strict_json
from finrepro.tracking.notes import SCALE_NOTES
from finrepro.tracking.projection import AXES

# key -> name, query of the runs, sort key (descending), columns from left to right.
VIEWS = {
    "results": (
        "Results",
        "tags.role = 'cell'",
        "metrics.`main/value`",
        [
            "tags.`status`",
            "tags.`scale`",
            "tags.`main_metric`",
            "metrics.`main/value`",
            "metrics.`main/low`",
            "metrics.`main/high`",
            "metrics.`main/constant`",
            "metrics.`cost/train_seconds`",
            "tags.`reason`",
            *(f"params.`{axis}`" for axis in AXES),
        ],
    ),
    "costs": (
        "Costs",
        "tags.role = 'cell'",
        "metrics.`cost/train_seconds`",
        [
            "tags.`status`",
            "tags.`scale`",
            "metrics.`main/value`",
            "metrics.`cost/trainable_params`",
            "metrics.`cost/trained_file_bytes`",
            "metrics.`cost/peak_memory_bytes`",
            "metrics.`cost/train_seconds`",
            "metrics.`cost/tokens_per_second`",
        ],
    ),
    "seeds": (
        "Mean over seeds",
        "tags.role = 'cell'",
        "metrics.`main/value`",
        [
            "metrics.`main/value`",
            "metrics.`main/low`",
            "metrics.`main/high`",
            "metrics.`main/constant`",
            "metrics.`cost/train_seconds`",
        ],
    ),
    "campaigns": (
        "Campaigns",
        "tags.role = 'campaign'",
        "attributes.start_time",
        ["tags.`status`", "tags.`scale`", "tags.`cells`", "tags.`command`"],
    ),
}
WIDTHS = {
    "tags.`status`": 75,
    "tags.`scale`": 70,
    "tags.`main_metric`": 125,
    "tags.`cells`": 220,
    "tags.`command`": 420,
}  # pixels


def experiment_tags(table: str, scale: str, experiment: str) -> dict[str, str]:
    """An experiment's description, the kind of page that it opens with, and its saved views (the
    menu Views).
    """
    links = " - ".join(f"[{name}]({link(experiment, key)})" for key, (name, *_) in VIEWS.items())
    description = (
        f"{links}\n\n{SCALE_NOTES.get(scale, '')}\n\n"
        "A parent run is a campaign, a call of `reproduce`; its children are cells. "
        "MLflow is a view: the evidence lies in results/runs/, one folder a run."
    )
    tags = {
        "mlflow.note.content": description,
        # else MLflow opens its page for traces of language models
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": "main/value",
        "tables": table,
        "scale": scale,
    }
    return tags | {f"mlflow.sharedViewState.{key}": _packed(key) for key in VIEWS}


def link(experiment: str, view: str = "results") -> str:
    """Where a saved view lies below the server's address; on MLflow's pages for training, not
    those for language models' traces.
    """
    query = f"viewStateShareKey={view}&workflowType=machine_learning"
    return f"#/experiments/{experiment}/runs?{query}"


def _packed(key: str) -> str:
    """The tag's value: the state that MLflow's page keeps of a view, compressed."""
    name, query, order, columns = VIEWS[key]
    grouped = {
        "aggregateFunction": "average",
        "groupByKeys": [{"mode": "tag", "groupByData": "configuration"}],
    }
    widths = {"attributes.`Run Name`": 300, "runDateAndNestInfo": 115, "duration": 80}
    widths |= {
        column: WIDTHS.get(column, 92 if column.startswith("metrics") else 110)
        for column in columns
    }
    state = {
        "searchFilter": query,
        "orderByKey": order,
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnWidths": widths,
        "columnOrder": ["attributes.`Run Name`", "runDateAndNestInfo", *columns, "duration"],
        "runsHiddenMode": "SHOW_ALL",
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": grouped if key == "seeds" else None,
        "groupsExpanded": {},
    }
    state_text = base64.b64encode(zlib.compress(strict_json.dumps(state).encode())).decode()
    return strict_json.dumps(
        {"name": name, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{state_text}"}
    )
