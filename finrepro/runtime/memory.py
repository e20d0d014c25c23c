"""Memory of this process: its peak, and what its allocator returns to the system."""

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
    """Begin the count of `peak_memory_bytes` anew, so that in a process that runs many cells the
    peak of one does not depend on those before it: what they have freed is released first.
    """
    gc.collect()
    if device.type != "cuda":
        release_freed()
    forget_peak_memory(device)


def release_freed() -> None:
    """Return freed memory to the system now. glibc keeps what lies between blocks in use, such as
    the quantized weights of a model that is loaded layer by layer: all of the model in the end.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak_memory(device: "torch.device") -> None:
    """Begin the count of `peak_memory_bytes` anew at what is in use now; takes microseconds, so
    that a training step may call it.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    # Where it is not permitted, the peak is that of the whole process: larger, never smaller.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: "torch.device") -> int:
    """Bytes of the largest memory since the last reset: allocated on the GPU, or on a CPU the
    resident size of the process.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
