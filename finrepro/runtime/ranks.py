"""Ranks of a cell: who is here, and what they agree on."""

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


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


def current() -> Ranks:
    """Read RANK, WORLD_SIZE and LOCAL_RANK, as torchrun and DeepSpeed's launcher set them; alone
    without.
    """
    return Ranks(*(int(os.environ.get(name, default)) for name, default in _RANK_DEFAULTS))


_RANK_DEFAULTS = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def start_process_group(device: "torch.device") -> None:
    """Join the cell's process group: nccl on GPUs, gloo on CPUs; alone, over an in-process store
    without a port.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        return
    for name, default in _RANK_DEFAULTS:
        os.environ.setdefault(name, default)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if current().world_size == 1:
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


def start_deepspeed(device: "torch.device") -> Any:
    """The module `deepspeed`, imported and joined to the cell's process group; nothing else may
    import it before.

    It is told to leave its shared-memory operator alone: that would be compiled at first use, which
    a machine without a compiler cannot do, and gloo does the same work.
    """
    start_process_group(device)
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), verbose=False, auto_mpi_discovery=False
        )
    return deepspeed


def largest_over_ranks(value: int, device: "torch.device") -> int:
    """The largest of the ranks' values; all ranks call it, after they have joined their process
    group.
    """
    if current().world_size == 1:
        return value
    import torch
    import torch.distributed as dist

    largest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def any_rank(flag: bool, device: "torch.device") -> bool:
    """Whether any rank says so: what all ranks have to do together."""
    return bool(largest_over_ranks(int(flag), device))
