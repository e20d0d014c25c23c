"""The main job from a cold store, as a user runs it: wall time and peak memory, then the same command again.

`reproduce --table 3` and `reproduce --table 3 --quick`, each into an empty store and once more; whole processes, with their children.
Pinned to two processors where the system allows it, so that figures of larger machines compare.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from _measure import write

from finrepro import PROJECT

COMMANDS = {"whole": (), "quick": ("--quick",)}


def watched(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command; wall seconds, and the largest resident memory of its processes together, sampled ten times a second."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = [0]

    def sample() -> None:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for each in [root, *root.children(recursive=True)]:
                try:
                    total += each.memory_info().rss
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
    return {"seconds": seconds, "peak_memory_bytes": peak[0], "exit_code": process.returncode}


def main() -> None:
    """Cold and warm, whole and quick."""
    usable = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, set(usable))
    environment = {
        key: value for key, value in os.environ.items() if key not in ("FINREPRO_DATA_DIR", "FINREPRO_STORE")
    }
    results = {}
    for name, options in COMMANDS.items():
        with tempfile.TemporaryDirectory() as store:
            base = [sys.executable, "-m", "invoke", "reproduce", "--table", "3", "--scale", "smoke", "--store", store]
            cold = watched([*base, *options], environment)
            warm = watched([*base, *options], environment)
            kept = len(list(Path(store).glob("results/runs/*/result.json")))
        results[name] = {"cold": cold, "again": warm, "results": kept, "processors": len(usable)}
    summary = {
        name: {
            "cold_seconds": round(result["cold"]["seconds"], 1),
            "again_seconds": round(result["again"]["seconds"], 2),
            "peak_memory_gib": round(result["cold"]["peak_memory_bytes"] / 2**30, 2),
            "exit_codes": [result["cold"]["exit_code"], result["again"]["exit_code"]],
        }
        for name, result in results.items()
    }
    write("table3", {"results": results, "summary": summary})


if __name__ == "__main__":
    main()
