"""The main job from a cold store, as a user runs it: wall time and peak memory, then the same
command again.

`reproduce --table 3` and `reproduce --table 3 --quick`, each into an empty store and once more;
whole processes, with their children. Pinned to two processors where the system allows it, so that
figures of larger machines compare.

    python benchmarks/table3.py [FOLDER] [BASELINE] [--dry]

With BASELINE, another checkout of the project whose packages are the same, the whole table is run
there as well, right before, and every run of one id is compared: its scores and predictions. A dry
run evaluates one untrained miniature in the place of both tables, and judges no goal.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from _measure import ARGUMENTS, DRY, sized, write

from finrepro import PROJECT

DRY_CELL = ("--only", "gpt2_127m_mini-none-base-tfns-s0", "--weights", "random")
COMMANDS: dict[str, tuple[str, ...]] = sized(
    {"whole": (), "quick": ("--quick",)}, {"whole": DRY_CELL}
)


def reproduce(store: str, *options: str) -> list[str]:
    """The command line of a table at smoke scale."""
    table = ["reproduce", "--table", "3", "--scale", "smoke", "--store", store]
    return [sys.executable, "-m", "invoke", *table, *options]


def watched(
    command: list[str], environment: dict[str, str], checkout: Path = PROJECT
) -> dict[str, Any]:
    """Run a command; wall seconds, and the largest resident memory of its processes together,
    sampled ten times a second.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=environment | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = [0]

    def sample() -> None:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for member in [root, *root.children(recursive=True)]:
                try:
                    total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total)
            time.sleep(0.1)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - began
    if process.returncode:
        print(output)
        assert not DRY, f"exit code {process.returncode}"
    return {"seconds": seconds, "peak_memory_bytes": peak[0], "exit_code": process.returncode}


def differing_runs(first: Path, second: Path) -> dict[str, list[str]]:
    """Labels of the runs of both stores that are `equal` in scores and predictions, or `other`,
    and those that only one store has.
    """
    labels: dict[str, list[str]] = {"equal": [], "other": [], "in one store": []}
    folders = [
        {path.parent.name: path.parent for path in store.glob("results/runs/*/result.json")}
        for store in (first, second)
    ]
    for run_id in sorted(folders[0].keys() | folders[1].keys()):
        pair = [folder[run_id] for folder in folders if run_id in folder]
        results = [json.loads((path / "result.json").read_text("utf-8")) for path in pair]
        predictions = [
            (path / "predictions.jsonl").read_bytes()
            for path in pair
            if (path / "predictions.jsonl").is_file()
        ]
        kind = "other"
        if len(pair) == 1:
            kind = "in one store"
        elif results[0]["scores"] == results[1]["scores"] and len(set(predictions)) <= 1:
            kind = "equal"
        labels[kind].append(results[0]["label"])
    return labels


def scores(store: Path) -> dict[str, dict[str, float]]:
    """Label -> accuracy and the lower bound of its gain over the constant answer, of what was
    trained long enough to show quality.
    """
    by_label = {}
    for path in sorted(store.glob("results/runs/*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["spec"]["train"]["short"] or result["spec"]["adapter"]["kind"] == "base":
            continue
        for score in result["scores"]:
            if score["metric"] == "accuracy":
                by_label[result["label"]] = {
                    "accuracy": score["value"],
                    "gain_low": score["gain_low"],
                }
    return by_label


def measured(name: str, environment: dict[str, str], baseline: Path | None) -> dict[str, Any]:
    """A command into an empty store and once more, after the same in the baseline's checkout."""
    command, comparison = COMMANDS[name], {}
    with tempfile.TemporaryDirectory() as store, tempfile.TemporaryDirectory() as baseline_store:
        if baseline:
            comparison["baseline"] = watched(
                reproduce(baseline_store, *command), environment, baseline
            )
        cold = watched(reproduce(store, *command), environment)
        again = watched(reproduce(store, *command), environment)
        if baseline:
            comparison["runs"] = differing_runs(Path(baseline_store), Path(store))
            comparison["of_baseline"] = cold["seconds"] / comparison["baseline"]["seconds"]
        # Named by the selection; the store holds no other.
        (table,) = (Path(store) / "results/tables/smoke").glob("table3*.md")
        return {
            "cold": cold,
            "again": again,
            "quality": scores(Path(store)),
            "table": table.read_text(encoding="utf-8"),
            **comparison,
        }


def goals_met(results: dict[str, Any], tfns: dict[str, dict[str, float]]) -> dict[str, bool]:
    """Which goals of speed, memory and quality the figures meet."""
    cold, quick = results["whole"]["cold"], results["quick"]["cold"]
    full = [score["accuracy"] for label, score in tfns.items() if "-full-" in label]
    lora = [score["accuracy"] for label, score in tfns.items() if "-lora_r8-" in label]
    return {
        "whole table in 1200 s": cold["seconds"] <= 1200,
        "under 8 GiB": cold["peak_memory_bytes"] < 8 * 2**30,
        "again in 5 s": results["whole"]["again"]["seconds"] <= 5,
        "quick in 120 s": quick["seconds"] <= 120,
        "full fine-tuning of a miniature at 0.75": max(full) >= 0.75,
        "LoRA at 0.69": min(lora) >= 0.69,
        "paired interval above the constant answer": all(
            score["gain_low"] > 0 for score in tfns.values()
        ),
    }


def main() -> None:
    """Cold and warm, whole and quick."""
    processors = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, set(processors))
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("FINREPRO_DATA_DIR", "FINREPRO_STORE")
    }
    baseline = Path(ARGUMENTS[1]).resolve() if len(ARGUMENTS) > 1 else None
    results = {
        name: measured(name, environment, baseline if name == "whole" else None)
        for name in COMMANDS
    }
    tables = {name: result.pop("table") for name, result in results.items()}
    summary: dict[str, Any] = {
        name: {
            "cold_seconds": round(result["cold"]["seconds"], 1),
            "again_seconds": round(result["again"]["seconds"], 2),
            "peak_memory_gib": round(result["cold"]["peak_memory_bytes"] / 2**30, 2),
            "exit_codes": [result["cold"]["exit_code"], result["again"]["exit_code"]],
        }
        for name, result in results.items()
    }
    if baseline:
        summary["whole"] |= {
            "of_baseline": round(results["whole"]["of_baseline"], 3),
            "runs": {kind: len(labels) for kind, labels in results["whole"]["runs"].items()},
        }
    tfns = {
        label: score for label, score in results["whole"]["quality"].items() if "-tfns-" in label
    }
    summary["accuracy"] = {label: round(score["accuracy"], 4) for label, score in tfns.items()}
    if not DRY:
        summary["goals_met"] = goals_met(results, tfns)
    for result in results.values():
        result["processors"] = len(processors)
    write("table3", {"results": results, "table": tables["whole"], "summary": summary})


if __name__ == "__main__":
    main()
