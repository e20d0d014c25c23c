"""Memory and GPUs of this machine, read without loading a GPU library."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class LocalMachine:
    """Bytes of host memory and of the smallest GPU's memory (0 without one), the GPUs, and the CPU
    cores that this process may use.
    """

    memory_bytes: int
    gpu_bytes: int
    gpu_name: str = ""
    gpus: int = 0
    cores: int = 1


@cache
def local_machine() -> LocalMachine:
    """This machine, as psutil and nvidia-smi report it."""
    host, cores = available_memory(), available_cores()
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
            mebibytes, name = min(lines, key=lambda line: float(line[0]))
            return LocalMachine(
                host, int(float(mebibytes) * 2**20), name.strip(), len(lines), cores
            )
    return LocalMachine(host, 0, cores=cores)


def available_memory(group: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of memory that this process may use: the machine's, or fewer where its control group
    has a limit (`docker run --memory 8g`).
    """
    import psutil

    total = psutil.virtual_memory().total
    try:
        return min(total, int(group.read_text()))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return total


def available_cores(group: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use: those of its affinity, or fewer where its control group
    has a share of time (`docker run --cpus 2`: "200000 100000" microseconds, or "max").
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = group.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such group, or no limit
        return cores


def cards(jobs: int) -> list[dict[str, str]]:
    """The environment of each job, so that each has a GPU of its own; empty for a single job and
    without GPUs.
    """
    if jobs == 1 or not local_machine().gpus:
        return [{}] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(jobs)))
    return [{"CUDA_VISIBLE_DEVICES": card.strip()} for card in visible.split(",")[:jobs]]
