"""Interleaved timing of named candidates, and the JSON that prose quotes: raw seconds, machine,
commit.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finrepro.evidence import provenance


def interleaved(
    candidates: dict[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate, run in turn so that a drift of the machine meets all alike; one
    warm-up round before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            began = clock()
            run()
            if turn:
                seconds[name].append(clock() - began)
    return seconds


def ratios(baseline: list[float], candidate: list[float]) -> dict[str, float]:
    """How many times faster the candidate is than the baseline, round by round."""
    each = [slow / fast for slow, fast in zip(baseline, candidate, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def write(name: str, result: dict[str, Any]) -> None:
    """Write `<folder>/<name>.json` (the folder is the program's argument) and print the summary."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    environment = provenance.environment()
    machine = {key: environment[key] for key in ("git_commit", "git_dirty", "hardware", "python")}
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps(
            {"benchmark": name, "date": time.strftime("%Y-%m-%d"), **result, **machine}, indent=1
        )
        + "\n"
    )
    print(f"{name}: {json.dumps(result['summary'], indent=1)}\n-> {path}")
