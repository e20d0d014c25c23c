"""The process a cell runs in: ranks, devices, threads, seeds and determinism, set before anything is computed."""

import contextlib
import ctypes
import gc
import os
import random
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

OFFLINE = {"DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a cell, from the launcher's environment."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the results."""
        return self.rank == 0


def ranks() -> Ranks:
    """Read RANK, WORLD_SIZE and LOCAL_RANK, as torchrun and DeepSpeed's launcher set them; alone without."""
    return Ranks(*(int(os.environ.get(name, default)) for name, default in _RANK_DEFAULTS))


_RANK_DEFAULTS = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def quiet_environment() -> None:
    """No telemetry, quiet libraries, reproducible cuBLAS, one machine's ranks on loopback; call it before torch is imported."""
    os.environ.update(OFFLINE)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # A thread that waits for the others looks this often before it sleeps. OpenMP's own 300,000 keeps a core from whoever would let it go
    # on: two cells side by side on two cores took five times as long as one. No bit of a result depends on it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    world_size = os.environ.get("WORLD_SIZE", "1")
    if os.environ.get("LOCAL_WORLD_SIZE", world_size) == world_size:  # one machine: gloo stays on the loopback device
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def setup(seed: int, threads: int) -> "torch.device":
    """Seed every global generator, fix the threads, ask for deterministic kernels; the device of this rank.

    Our own code draws from private generators; the global ones are seeded for what libraries draw.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (for libraries)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Libraries' notices about their own internals; a user can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed|transformers")
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks().local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def start_process_group(device: "torch.device") -> None:
    """Join the cell's process group: nccl on GPUs, gloo on CPUs; alone, over an in-process store without a port."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    for name, default in _RANK_DEFAULTS:
        os.environ.setdefault(name, default)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if ranks().world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    else:
        dist.init_process_group(backend)


def leave_process_group() -> None:
    """Leave the cell's process group, where there is one, so that no rank waits for this one."""
    if "torch.distributed" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End the process with what it has written, and without the interpreter's teardown; for processes that have computed in a group.

    Gloo's threads outlive the group, whose references DDP and DeepSpeed keep, and free the tensors of the last exchange. One that waits for
    the interpreter's lock while the interpreter is taken apart is ended by force inside a destructor, which aborts the process
    ("terminate called without an active exception"): its results are whole, and its launcher fails the cell.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody may listen any more
            stream.flush()
    os._exit(code)


def start_deepspeed(device: "torch.device") -> Any:
    """The module `deepspeed`, imported and joined to the cell's process group; nothing else may import it before.

    It is told to leave its shared-memory operator alone: that would be compiled at first use, which a machine without a compiler cannot
    do, and gloo does the same work.
    """
    start_process_group(device)
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False, auto_mpi_discovery=False)
    return deepspeed


def largest_over_ranks(value: int, device: "torch.device") -> int:
    """The largest of the ranks' values; all ranks call it, after they have joined their process group."""
    if ranks().world_size == 1:
        return value
    import torch
    import torch.distributed as dist

    largest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def any_rank(flag: bool, device: "torch.device") -> bool:
    """Whether any rank says so: what all ranks have to do together."""
    return bool(largest_over_ranks(int(flag), device))


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however that happens."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG of linux/prctl.h


def reset_peak_memory(device: "torch.device") -> None:
    """Forget the peak that `peak_memory_bytes` gives, so that a cell's is its own in a process that runs many.

    What earlier cells have freed is given back first: glibc would keep it, and a cell's peak would depend on those before it.
    """
    gc.collect()
    if device.type != "cuda":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
    forget_peak_memory(device)


def forget_peak_memory(device: "torch.device") -> None:
    """Let `peak_memory_bytes` begin again at what is held now; microseconds, so that it can be done within a step."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not permitted here: the peak is then the process's, larger, never smaller
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: "torch.device") -> int:
    """Largest memory since the last reset: allocated on the GPU, or the process's resident size on a CPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
