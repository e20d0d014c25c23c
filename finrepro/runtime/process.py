"""The process a cell runs in: ranks, devices, threads, seeds and determinism, set before
anything is computed.
"""

import contextlib
import ctypes
import os
import random
import signal
import sys
import warnings
from typing import TYPE_CHECKING, NoReturn

from finrepro.runtime import memory
from finrepro.runtime.ranks import current

if TYPE_CHECKING:
    import torch

OFFLINE = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def quiet_environment() -> None:
    """No telemetry, quiet libraries, no code from a hub, reproducible cuBLAS, one machine's ranks
    on loopback; call it before torch is imported.
    """
    os.environ.update(OFFLINE)
    # bitsandbytes 0.50.2 asks this package for compiled code from a hub when it is imported on a
    # CPU with AVX512-BF16. It is in no lock; where it is installed all the same, it is not found.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # A thread that waits for the others looks this often before it sleeps. OpenMP's own 300,000
    # keeps a core from whoever would let it go on: two cells side by side on two cores took five
    # times as long as one. No bit of a result depends on it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    world_size = os.environ.get("WORLD_SIZE", "1")
    if (
        os.environ.get("LOCAL_WORLD_SIZE", world_size) == world_size
    ):  # one machine: gloo stays on the loopback device
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def setup(seed: int, threads: int) -> "torch.device":
    """Seed every global generator, fix the threads, ask for deterministic kernels; the device of
    this rank.

    Our own code draws from private generators; the global ones are seeded for what libraries draw.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (for libraries)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    memory.reuse_freed_memory()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Libraries' notices about their own internals; a user can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed|transformers")
    if torch.cuda.is_available():
        device = torch.device("cuda", current().local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def end(code: int) -> NoReturn:
    """End the process with what it has written, and without the interpreter's teardown; for
    processes that have computed in a group.

    Gloo's threads outlive the group, whose references DDP and DeepSpeed keep, and free the tensors
    of the last exchange. One that waits for the interpreter's lock while the interpreter is taken
    apart is ended by force inside a destructor, which aborts the process ("terminate called without
    an active exception"): its results are whole, and its launcher fails the cell.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody may listen any more
            stream.flush()
    os._exit(code)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however that happens. One that is
    dead by now kills nobody: `descends_from` tells.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG of linux/prctl.h


def descends_from(ancestor: int) -> bool:
    """Whether the process `ancestor` is this one's parent, or its parent's, and so on: it lives."""
    import psutil

    number = os.getppid()
    with contextlib.suppress(psutil.Error):  # one between has just ended
        while number not in (0, ancestor):
            number = psutil.Process(number).ppid()
    return number == ancestor
