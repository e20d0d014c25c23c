"""What this machine can hold, asked without loading a GPU library."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Machine:
    """What this machine can hold: memory of its host and of its smallest GPU (0 without one)."""

    memory_bytes: int
    gpu_bytes: int
    gpu_name: str = ""
    gpus: int = 0


@cache
def machine() -> Machine:
    """Look at the host and at its GPUs, without loading a GPU library."""
    import psutil

    host = psutil.virtual_memory().total
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") and visible not in ("", "-1"):
        query = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
        query += [f"--id={visible}"] if visible else []
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        lines = (
            [line.split(",", 1) for line in answer.stdout.strip().splitlines()]
            if answer.returncode == 0
            else []
        )
        if lines:
            smallest = min(lines, key=lambda line: float(line[0]))
            return Machine(host, int(float(smallest[0]) * 2**20), smallest[1].strip(), len(lines))
    return Machine(host, 0)


def cards(jobs: int) -> list[dict[str, str]]:
    """The environment that gives each of several jobs a GPU of its own; nothing to give where
    there is one job or no GPU.
    """
    if jobs == 1 or not machine().gpus:
        return [{}] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(jobs)))
    return [{"CUDA_VISIBLE_DEVICES": card.strip()} for card in visible.split(",")[:jobs]]
