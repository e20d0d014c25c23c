"""Peak memory of this process."""

import contextlib
import ctypes
import gc
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# glibc's numbers (malloc.h), and sizes in bytes. 32 MiB is what glibc itself goes up to.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_REUSED, KEPT_FREE, GROWTH = 32 << 20, 1 << 30, 16 << 20


def reuse_freed_memory() -> None:
    """Have the C library reuse the memory of freed tensors of up to 32 MiB, without giving it back
    to the system in between.

    Otherwise each step of a small model maps its activations anew: 6,000 page faults, a twentieth
    of its time. No bit of a result depends on it. Does nothing with another C library than glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_REUSED)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_FREE)
        libc.mallopt(M_TOP_PAD, GROWTH)


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
