"""Peak memory of this process."""

import contextlib
import ctypes
import gc
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reset_peak_memory(device: "torch.device") -> None:
    """Forget the peak that `peak_memory_bytes` gives, so that a cell's is its own in a process that
    runs many.

    What earlier cells have freed is given back first: glibc would keep it, and a cell's peak would
    depend on those before it.
    """
    gc.collect()
    if device.type != "cuda":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
    forget_peak_memory(device)


def forget_peak_memory(device: "torch.device") -> None:
    """Let `peak_memory_bytes` begin again at what is held now; microseconds, so that it can be
    done within a step.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(
        OSError
    ):  # not permitted here: the peak is then the process's, larger, never smaller
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: "torch.device") -> int:
    """Largest memory since the last reset: allocated on the GPU, or the process's resident size
    on a CPU.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
