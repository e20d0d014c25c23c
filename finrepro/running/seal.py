"""The result of a finished cell: costs, facts, files."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from finrepro.catalogue.spec import RunSpec

if TYPE_CHECKING:
    import torch


def measured_rate(spec: RunSpec, device: "torch.device") -> float | None:
    """FLOP/s of large matrix products here and now, in the model's dtype: what a pretraining
    run's own speed is held against.
    """
    if spec.weights != "scratch":
        return None
    import torch

    from finrepro.runtime import matmul

    return matmul.measure(device, getattr(torch, spec.model.dtype), seconds=1.0).flops


def median_step(losses: Sequence[dict[str, Any]]) -> float | None:
    """The median seconds of a training step after the first two, which warm up."""
    ends = [row["seconds"] for row in losses]
    each = [later - earlier for earlier, later in pairwise(ends)][1:]
    return median(each) if each else None
