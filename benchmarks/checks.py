"""What it costs to check everything that is read: `reproduce` on a finished Table 3 with and
without the checks, and a base's digest against `sha256sum`.

    python benchmarks/checks.py [FOLDER] [--dry]

The store is sealed here: every cell of the table with a result of the usual size, which nobody has
trained.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from _measure import interleaved, sized, write

from finrepro import PROJECT
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec
from finrepro.evidence.digests import SETTLED, Digests
from finrepro.evidence.files import write_json, write_lines
from finrepro.evidence.result import header
from finrepro.evidence.store import DONE, Store, open_store

REPEATS = sized(9, 1)
BASE_BYTES = sized(500_000_000, 1_000_000)
LINES = {"predictions.jsonl": 2_388, "loss.jsonl": 60, "system.jsonl": 60}
LOSS = {"loss": 2.5, "grad_norm": 1.0, "lr": 0.001, "seconds": 0.5, "tokens": 9}
ROWS: dict[str, dict[str, Any]] = {
    "predictions.jsonl": {"id": "tfns-test-0", "prediction": "neutral", "text": "x" * 140},
    "loss.jsonl": {"step": 1, **LOSS},
    "system.jsonl": {"time": 1.7e9, "process_memory_gib": 1.0},
}
WEIGHTS = 1_000_000
PROGRAM = """
import json, sys
from pathlib import Path
from finrepro import api
from finrepro.evidence import schema, store
if sys.argv[2] == "without":
    store.read_run = lambda folder, *_: (schema.read(folder / "result.json"), [])
    schema.examine = lambda path: (json.loads(path.read_text()), "")
states = api.reproduce(3, "smoke", only=sys.argv[3] or None, store=Path(sys.argv[1]), quiet=True)
assert set(states.states.values()) == {"done"} and not states.faults, states
"""


def seal(store: Store, spec: RunSpec, generator: random.Random) -> None:
    """A finished run of the usual size."""
    with store.new_run(spec.run_id) as folder:
        (folder / "weights").mkdir()
        (folder / "weights" / "model.safetensors").write_bytes(generator.randbytes(WEIGHTS))
        for name, row in ROWS.items():
            write_lines(folder / name, [row] * LINES[name])
        write_json(folder / "result.json", header(spec, DONE, None, time.time()))


def reproduce(store: Path, which: str, only: str) -> None:
    """`reproduce`, where nothing is left to be done."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", PROGRAM, str(store), which, only]
    subprocess.run(command, cwd=PROJECT, env=environment, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Whole processes in turn; then the digest of a base."""
    only = str(sized("", "gpt2_127m_mini-none-full-tfns-*"))
    with tempfile.TemporaryDirectory() as name:
        folder, generator = Path(name), random.Random(0)
        store = open_store(folder / "store")
        cells = expand(Selection("3", only=only or None), "smoke")
        specs = {cell.spec.run_id: cell.spec for cell in cells if not cell.refusal}
        specs |= {cell.base.run_id: cell.base for cell in cells if cell.base and not cell.refusal}
        for spec in specs.values():
            seal(store, spec, generator)
        time.sleep(SETTLED)
        reproduce(store.root, "with", only)  # MLflow's view, and the digests
        seconds = interleaved(
            {which: partial(reproduce, store.root, which, only) for which in ("with", "without")},
            REPEATS,
        )
        base = folder / "base.safetensors"
        base.write_bytes(generator.randbytes(10**6) * (BASE_BYTES // 10**6))
        time.sleep(SETTLED)
        digests = Digests(folder / "sha256")
        seconds |= interleaved(
            {
                "digest": partial(digests.read, base),
                "sha256sum": partial(
                    subprocess.run, ["sha256sum", base], check=True, stdout=subprocess.DEVNULL
                ),
                "digest_again": partial(digests.of, base),
            },
            REPEATS,
        )
    best = {name: min(times) for name, times in seconds.items()}
    write(
        "checks",
        {
            "seconds": seconds,
            "runs": len(specs),
            "summary": {
                "reproduce_ratio": round(best["with"] / best["without"], 3),
                "digest_ratio": round(best["digest"] / best["sha256sum"], 3),
                "digest_again_seconds": round(best["digest_again"], 6),
            },
        },
    )


if __name__ == "__main__":
    main()
