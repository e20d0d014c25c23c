"""Where a run's memory peaks: the largest memory of each phase of a cell, over all its steps,
attempts and ranks.

A phase begins where the one before it ends, so that every byte falls into one, and the largest of
the phases is the run's peak. The phases are `data`, `load` (the model and its engine), `compile`
(the proof, where training is compiled), `backward` (forward and backward passes), `step` (the
update, whose first call allocates the optimizer's state), `evaluate` and `save` (checkpoints, and
the weights at the end). Changing phase reads one counter and resets it. On a CPU the counter is
that of the whole process, with what the C library keeps of what was freed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from finrepro.runtime import memory, ranks

if TYPE_CHECKING:
    import torch


class Phases:
    """The recorder of one process; the first phase begins with it. `peaks` has the bytes of the
    phases that have ended.
    """

    def __init__(self, device: "torch.device", first: str = "data") -> None:
        self.device, self.name = device, first
        self.peaks: dict[str, int] = {}
        memory.forget_peak_memory(device)

    def begin(self, name: str) -> None:
        """End the current phase and begin `name`, which may have been before: the larger peak
        stays.
        """
        self._note()
        memory.forget_peak_memory(self.device)
        self.name = name

    def forget(self) -> None:
        """Leave out the peak of the current phase until now."""
        memory.forget_peak_memory(self.device)

    def over_ranks(self) -> dict[str, int]:
        """The peaks until now, the largest over ranks; all ranks call it, in the same phase."""
        self._note()
        self.peaks = {
            name: ranks.largest_over_ranks(self.peaks[name], self.device)
            for name in sorted(self.peaks)
        }
        return dict(self.peaks)

    def carry(self, earlier: Mapping[str, int]) -> None:
        """Take up the peaks of an interrupted attempt."""
        for name, peak in earlier.items():
            self.peaks[name] = max(self.peaks.get(name, 0), peak)

    def costs(self) -> dict[str, int]:
        """`peak_memory_bytes`, the largest, and `peak_<phase>_bytes` of each phase until now."""
        self._note()
        by_phase = {f"peak_{name}_bytes": peak for name, peak in self.peaks.items()}
        return {"peak_memory_bytes": max(self.peaks.values())} | by_phase

    def _note(self) -> None:
        self.carry({self.name: memory.peak_memory_bytes(self.device)})
