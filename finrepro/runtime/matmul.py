"""The matrix rate of the device at hand: the best of a few shapes, measured for a few seconds,
and only when asked for.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# (rows, inner, columns): shapes that measured best on several GPUs (stas00/ml-engineering
# compute/accelerator@b9e29720), and square ones.
GPU_SHAPES = ((2048, 13312, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (1024, 5120, 10240))
CPU_SHAPES = ((256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (1024, 256, 1024))


@dataclass(frozen=True)
class Rate:
    """`flops` a second, of the best shape; `device` and `dtype` it was measured on."""

    flops: float
    shape: tuple[int, int, int]
    device: str
    dtype: str


def measure(device: "torch.device", dtype: "torch.dtype", seconds: float = 3.0) -> Rate:
    """The best mean rate over the shapes, in `seconds` for all of them; each is warmed up and
    timed in blocks between synchronisations.
    """
    import torch

    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    share, best = seconds / len(shapes), (0.0, shapes[0])
    for rows, inner, columns in shapes:
        first = torch.randn(rows, inner, device=device).to(dtype)
        second = torch.randn(inner, columns, device=device).to(dtype)
        product = torch.empty(rows, columns, device=device, dtype=dtype)
        for _ in range(3):
            torch.mm(first, second, out=product)
        count, spent, rounds = 0, 0.0, 4
        while spent < share:
            _wait(device)
            began = time.perf_counter()
            for _ in range(rounds):
                torch.mm(first, second, out=product)
            _wait(device)
            spent += time.perf_counter() - began
            count += rounds
            rounds = min(2 * rounds, 64)
        best = max(best, (2.0 * rows * inner * columns * count / spent, (rows, inner, columns)))
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return Rate(best[0], best[1], name, str(dtype).removeprefix("torch."))


def at_hand() -> Rate:
    """As `measure`, of this machine's first GPU in bfloat16, or without one of its processor in
    float32.
    """
    import torch

    if torch.cuda.is_available():
        return measure(torch.device("cuda"), torch.bfloat16)
    return measure(torch.device("cpu"), torch.float32)


def _wait(device: "torch.device") -> None:
    """Until a GPU has done everything that is queued."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
