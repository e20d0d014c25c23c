"""A result and a campaign as MLflow's names, tags, parameters, metrics and datasets, made from the
files alone.

Few keys, the same in every cell. Tags are what one filters by; the axes are parameters as well,
since MLflow's comparison of runs (difference, parallel coordinates) knows no tags.
finrepro.tracking.view writes all this into MLflow.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finrepro import strict_json
from finrepro.evidence.files import read_lines
from finrepro.tracking.notes import NOTE_LIMIT

AXES = ("model", "quantizer", "adapter", "train_on", "seed")
PARAMETER_LIMIT = 6000

MetricPoint = tuple[str, int | float, int, int]  # key, value, time in milliseconds, step


def milliseconds(seconds: float) -> int:
    """MLflow's unit of time."""
    return int(seconds * 1000)


def configuration(result: dict[str, Any]) -> str:
    """The label without its seed: what MLflow groups runs of several seeds by."""
    label = str(result["label"]).removesuffix(f"-s{result['cell']['seed']}")
    return " ".join([label, *variant(result)])


def variant(result: dict[str, Any]) -> list[str]:
    """Words that tell a cell from another one of the same label."""
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
    for axis in ("adapter", "quantizer"):
        values |= {f"{axis}.{key}": value for key, value in spec[axis].items()}
    values |= {key: spec[key] for key in ("base_run", "base_checkpoint", "threads", "world_size")}
    values |= {"dtype": spec["model"]["dtype"], "family": spec["model"]["family"]}
    # None says nothing that a missing parameter does not, and MLflow would compare it as a word.
    return {
        key: str(value)[:PARAMETER_LIMIT]
        for key, value in sorted(values.items())
        if value is not None
    }


def metrics(result: dict[str, Any], folder: Path) -> Iterator[MetricPoint]:
    """Every score, cost and training step; and the first score with its bounds as `main/...`, so
    that all runs have one column in common. Bounds of the others are in the note and result.json.
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
            source = strict_json.dumps({"files": files, "fingerprint": fingerprint})
            yield f"{dataset}/{split}", fingerprint[:32], source, split
