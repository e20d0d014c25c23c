"""Kills a tiny campaign at random points and goes on, again and again: `python kills_program.py
--kills 100 --seed 0`. Half of the kills come in the first half second after a worker's start, a
quarter in that after the command's, a quarter anywhere. Each campaign must end with the bits of
one that nobody killed; nothing that is finished may be lost or displaced meanwhile."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from fixtures.evidence import evidence, results

from finrepro import PROJECT

# file of configs/ -> what its cells train and how often they are resampled -> how often here
SHORTER = {
    "models.yaml": [("max_steps: 402 ", "max_steps: 6 "), ("warmup_steps: 50", "warmup_steps: 2")],
    "tables/table3.yaml": [
        ("max_steps: 60, warmup_steps: 10", "max_steps: 4, warmup_steps: 1"),
        ("resamples: 1000", "resamples: 20"),
    ],
}
MOMENTS = ("worker", "worker", "command", "anywhere")
EARLY = 0.5  # seconds


def tiny_project(folder: Path) -> Path:
    """A copy of the project whose cells train for a few steps."""
    for part in ("finrepro", "configs"):
        shutil.copytree(PROJECT / part, folder / part, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(PROJECT / "tasks.py", folder)
    for name, changes in SHORTER.items():
        text = (folder / "configs" / name).read_text()
        for old, new in changes:
            assert old in text, f"{name} has no {old!r} any more"
            text = text.replace(old, new)
        (folder / "configs" / name).write_text(text)
    return folder


def start(project: Path, store: Path) -> "subprocess.Popen[str]":
    """The campaign: one pretraining, one cell."""
    command = [sys.executable, "-m", "invoke", "reproduce", "--table", "3", "--scale", "smoke"]
    return subprocess.Popen(
        [*command, "--quick", "--only", "gpt2*-full-*", "--store", str(store)],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_worker(process: "subprocess.Popen[str]") -> None:
    """Return when the command has a worker, or has ended."""
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        for child in driver.children():
            try:
                if "finrepro.running.worker" in child.cmdline():
                    return
            except psutil.Error:  # it has just ended
                continue
        time.sleep(0.002)


def check(store: Path, before: dict[str, str]) -> dict[str, str]:
    """The evidence of a campaign that was cut short. Nothing of `before` may be missing."""
    failed = {label: run for label, run in results(store).items() if run["status"] != "done"}
    assert not failed, failed
    assert not (store / "results" / "superseded").exists(), "a finished result was displaced"
    now = evidence(store)
    assert before.items() <= now.items(), sorted(before.items() - now.items())
    return now


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    kills, campaigns, began = Counter[str](), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        project = tiny_project(folder / "project")
        process = start(project, folder / "uninterrupted")
        output, _ = process.communicate()
        assert process.returncode == 0, output
        duration = time.monotonic() - began
        reference = check(folder / "uninterrupted", {})
        store, kept = folder / "killed0", dict[str, str]()
        while True:
            process = start(project, store)
            moment = draw.choice(MOMENTS)
            if moment == "worker":
                wait_for_worker(process)
            if kills.total() < options.kills:
                try:
                    process.wait(draw.uniform(0, duration if moment == "anywhere" else EARLY))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    kills[moment] += 1
            output, _ = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), output
            kept = check(store, kept)
            if process.returncode == 0:
                assert kept == reference, sorted(kept.items() ^ reference.items())
                campaigns += 1
                if kills.total() == options.kills:
                    break
                store, kept = folder / f"killed{campaigns}", {}
    facts = {
        "kills": dict(kills),
        "campaigns": campaigns,
        "equal_files": len(reference),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
