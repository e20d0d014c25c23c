"""What MLflow is shown of a result and of a campaign: names, tags, parameters, metrics, notes and
views, made from the files alone.

Few keys, the same in every cell. Tags are what one filters by; the axes are parameters as well,
since MLflow's comparison of runs (difference, parallel coordinates) knows no tags.
finrepro.tracking.view puts all this into MLflow.
"""

import base64
import html
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finrepro.evidence.files import read_lines

AXES = ("model", "quantizer", "adapter", "train_on", "seed")
SMOKE = "**SMOKE: a miniature, never to be set against published values.**"
NOTE_LIMIT = 7900  # MLflow cuts a tag at 8,000 characters, without a word
PARAMETER_LIMIT = 6000

Point = tuple[str, float, int, int]  # key, value, time in milliseconds, step


def milliseconds(seconds: float) -> int:
    """MLflow's unit of time."""
    return int(seconds * 1000)


def configuration(result: dict[str, Any]) -> str:
    """The label without its seed: what runs of several seeds have in common, and what MLflow can
    group by.
    """
    label = str(result["label"]).removesuffix(f"-s{result['cell']['seed']}")
    return " ".join([label, *variant(result)])


def variant(result: dict[str, Any]) -> list[str]:
    """What sets a cell apart from another one of the same label."""
    cell, train = result["cell"], result["spec"]["train"]
    devices = cell.get("devices", 1)
    return [
        *(["(short)"] if train["short"] else []),
        *(["(random weights)"] if cell["weights"] == "random" else []),
        *([f"({devices} devices)"] if devices > 1 else []),
    ]


def cell_name(result: dict[str, Any]) -> str:
    """The run's name in MLflow."""
    return " ".join([result["label"], *variant(result)])


def campaign_name(campaign: dict[str, Any]) -> str:
    """The parent run's name: when the command was given, in UTC."""
    moment = time.strftime("%Y-%m-%d %H:%M", time.gmtime(campaign["started"]))
    return f"{campaign['rendered']} {campaign['scale']}, {moment}"


def git_tags(environment: dict[str, Any]) -> dict[str, str]:
    """The commit, set by hand: MLflow finds none where there is no git, and does not say so."""
    commit = environment["git_commit"] or "unknown"
    dirty = str(environment["git_dirty"]).lower()
    return {
        "git_dirty": dirty,
        "mlflow.source.git.commit": commit,
        "mlflow.source.name": "finrepro",
    }


def cell_tags(result: dict[str, Any]) -> dict[str, str]:
    """What a run can be found by. Its status and digest are set last, once it is whole."""
    tags = {"reason": result["reason"]} if result["reason"] else {}
    tags |= {key: str(result["cell"][key]) for key in ("scale", *AXES, "weights")}
    tags["configuration"] = configuration(result)
    if result["scores"]:
        tags["main_metric"] = "{task} {metric}".format_map(result["scores"][0])
    if notes := result["cell"].get("notes"):
        tags["notes"] = "; ".join(map(str, notes))[:NOTE_LIMIT]
    tags["role"] = "base" if result["cell"]["weights"] == "scratch" else "cell"
    return tags | {"run_id": result["run_id"], **git_tags(result["environment"])}


def campaign_tags(campaign: dict[str, Any]) -> dict[str, str]:
    """Tags of a parent run."""
    states = [cell["status"] for cell in campaign["cells"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    return {
        "status": campaign["status"],
        "scale": campaign["scale"],
        "cells": counts,
        "command": campaign["command"],
        "tables": campaign["table"],
        "role": "campaign",
        "campaign": campaign["id"],
        **git_tags(campaign["environment"]),
    }


def parameters(result: dict[str, Any]) -> dict[str, str]:
    """The axes and how the cell was trained; the whole spec is in result.json."""
    spec, cell = result["spec"], result["cell"]
    values = {key: cell[key] for key in (*AXES, "weights")}
    values |= {key: value for key, value in spec["train"].items() if key != "optimizer"}
    values |= {f"optimizer.{key}": value for key, value in spec["train"]["optimizer"].items()}
    for part in ("adapter", "quantizer"):
        values |= {f"{part}.{key}": value for key, value in spec[part].items()}
    values |= {key: spec[key] for key in ("base_run", "base_checkpoint", "threads", "world_size")}
    values |= {"dtype": spec["model"]["dtype"], "family": spec["model"]["family"]}
    # None says nothing that a missing parameter does not, and MLflow would compare it as a word.
    return {
        key: str(value)[:PARAMETER_LIMIT]
        for key, value in sorted(values.items())
        if value is not None
    }


def metrics(result: dict[str, Any], folder: Path) -> Iterator[Point]:
    """The first score with its bounds as `main/...`, so that runs have one column in common; every
    score, cost and step.

    Bounds of the other scores are in the note and in result.json.
    """
    end = milliseconds(result["ended"])
    for score in result["scores"][:1]:
        for field in ("value", "low", "high", "constant", "gain"):
            if score.get(field) is not None:
                yield f"main/{field}", score[field], end, 0
    for score in result["scores"]:
        yield f"eval/{score['task']}/{score['metric']}", score["value"], end, 0
    for name, value in result["costs"].items():
        if isinstance(value, int | float):
            yield f"cost/{name}", value, end, 0
    for row in read_lines(folder / "loss.jsonl"):
        for field in ("loss", "grad_norm", "lr"):
            yield (
                f"train/{field}",
                row[field],
                milliseconds(result["started"] + row["seconds"]),
                row["step"],
            )
    # MLflow keeps what is named system/ apart, under a tab of its own.
    for step, row in enumerate(read_lines(folder / "system.jsonl")):
        for name, value in row.items():
            if name != "time":
                yield f"system/{name}", value, milliseconds(row["time"]), step


def datasets(result: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Name, digest, source and context of every split. The digest is our fingerprint of all
    examples; MLflow's own sees the first rows.
    """
    for dataset, splits in result["data"].get("fingerprints", {}).items():
        files = result["data"]["files"][dataset]
        for split, fingerprint in splits.items():
            source = json.dumps({"files": files, "fingerprint": fingerprint})
            yield f"{dataset}/{split}", fingerprint[:32], source, split


def cell_note(result: dict[str, Any], folder: Path) -> str:
    """What a reviewer reads first in a run: the scores with their intervals, or why there are
    none.
    """
    head = [SMOKE] if result["cell"]["scale"] == "smoke" else []
    if result["status"] != "done":
        head.append(f"**{result['status']}**: {result['reason']}")
    rows = [
        f"| {s['task']} | {s['metric']} | {s['value']:.4f} [{s['low']:.4f}, {s['high']:.4f}] | "
        f"{'' if s['constant'] is None else format(s['constant'], '.4f')} |"
        for s in result["scores"]
    ]
    table = (
        ["| task | metric | value [95 % interval] | best constant |", "|---|---|---|---|", *rows]
        if rows
        else []
    )
    evidence = f"Evidence: results/runs/{folder.name}/ (`sha256sum -c manifest.sha256`)"
    return cut("\n\n".join([*head, *(["\n".join(table)] if table else []), evidence]), evidence)


def cut(text: str, last: str) -> str:
    """A note that MLflow keeps whole: what is too long loses whole lines, and says so."""
    if len(text) <= NOTE_LIMIT:
        return text
    end = text.rfind("\n", 0, NOTE_LIMIT - len(last) - 20)
    return f"{text[:end]}\n\n(cut) {last}"


def table_html(table: dict[str, Any]) -> str:
    """A table's JSON as a page that MLflow shows: every row with the run ids behind it."""

    def row(texts: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    def runs(line: dict[str, Any]) -> str:
        return " ".join(
            cell["run_id"] for cell in line["evidence"].get("cells", []) if cell.get("run_id")
        )

    body, previous = [], None
    for line in table["lines"]:
        if previous is not None and line["section"] != previous:
            body.append(row([""] * (len(table["columns"]) + 1), "td"))
        previous = line["section"]
        body.append(row([*line["texts"], runs(line)], "td"))
    style = "body{font:13px sans-serif}table{border-collapse:collapse}td,th{padding:3px 9px;text-align:left;border-bottom:1px solid #ddd}"
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table["notes"])
    return (
        f"<!doctype html><meta charset=utf-8><style>{style}</style><h3>{html.escape(table['caption'])}</h3>"
        f"<table>{row([*table['columns'], 'Runs'], 'th')}{''.join(body)}</table>{notes}\n"
    )


# Saved views: key -> name, which runs, by what they are sorted, columns in the columns' order.
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
    """An experiment's description, the kind of page it opens with, and its saved views (menu
    Views).
    """
    links = " - ".join(f"[{name}]({link(experiment, key)})" for key, (name, *_) in VIEWS.items())
    about = f"{links}\n\n{SMOKE if scale == 'smoke' else ''}\n\nA parent run is a campaign, a call of `reproduce`; its children are cells."
    kept = "MLflow is a view: the evidence lies in results/runs/, one folder a run."
    tags = {
        "mlflow.note.content": f"{about} {kept}",
        # else MLflow opens its page for traces of language models
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": "main/value",
        "tables": table,
        "scale": scale,
    }
    return tags | {f"mlflow.sharedViewState.{key}": _view(key) for key in VIEWS}


def link(experiment: str, view: str = "results") -> str:
    """Where a saved view lies below the server's address; on MLflow's pages for training, not
    those for language models' traces.
    """
    return f"#/experiments/{experiment}/runs?viewStateShareKey={view}&workflowType=machine_learning"


def _view(key: str) -> str:
    """A saved view in the form that MLflow's own page writes (3.17.2, read from a view saved
    there); an unknown one shows as default.
    """
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
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})
