"""Interleaved timing of named candidates, and the JSON that prose quotes: raw seconds, machine,
commit.

    python benchmarks/NAME.py [FOLDER] [BASELINE] [--dry]

The JSON goes into FOLDER, by default benchmarks/results. `--dry` shows in seconds that a benchmark
still runs: the sizes that `sized` gives, one repetition without a warm-up, and a FOLDER that has to
be named, because its figures are no result.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from finrepro.evidence import provenance

Size = TypeVar("Size")

RESULTS = Path(__file__).parent / "results"
DRY = "--dry" in sys.argv[1:]
ARGUMENTS = [argument for argument in sys.argv[1:] if argument != "--dry"]
DRY_OPTION = ("--dry",) if DRY else ()  # for processes that a benchmark starts of itself


if DRY and (not ARGUMENTS or Path(ARGUMENTS[0]).resolve() == RESULTS.resolve()):
    raise SystemExit("--dry needs a folder of its own: its figures are no result.")


def sized(full: Size, dry: Size) -> Size:
    """The benchmark's own size, or the tiny one of a dry run."""
    return dry if DRY else full


def output_folder() -> Path:
    """Where the JSON goes."""
    return Path(ARGUMENTS[0]) if ARGUMENTS else RESULTS


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate, run in turn so that a drift of the machine meets all alike; one
    warm-up round before, but in a dry run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    warm_up_rounds = sized(1, 0)
    for turn in range(warm_up_rounds + repeats):
        for name, run in candidates.items():
            began = clock()
            run()
            if turn >= warm_up_rounds:
                seconds[name].append(clock() - began)
    return seconds


def ratios(baseline: list[float], candidate: list[float]) -> dict[str, float]:
    """How many times faster the candidate is than the baseline, round by round."""
    by_round = [slow / fast for slow, fast in zip(baseline, candidate, strict=True)]
    return {"median": statistics.median(by_round), "min": min(by_round), "max": max(by_round)}


def write(name: str, result: dict[str, Any]) -> None:
    """Write `<output_folder()>/<name>.json` and print the summary."""
    folder = output_folder()
    folder.mkdir(parents=True, exist_ok=True)
    environment = provenance.environment()
    machine = {key: environment[key] for key in ("git_commit", "git_dirty", "hardware", "python")}
    record = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), **result, **machine}
    if DRY:
        record["dry"] = True
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name}: {json.dumps(result['summary'], indent=1)}\n-> {path}")
