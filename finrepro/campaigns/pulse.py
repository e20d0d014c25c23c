"""What the running cells are doing, a line a minute: for logs, where no bar moves."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from finrepro.running.events import Event

INTERVAL = 60.0  # seconds


@dataclass
class _Running:
    """A cell's last phase and step, and the first step that was seen of it, with its time."""

    phase: str = "start"
    step: Event | None = None
    first_step: int = 0
    first_time: float = 0.0

    def text(self) -> str:
        if self.step is None or self.phase != "train":
            return self.phase
        done, steps = self.step["step"], self.step["steps"]
        left = ""
        if done > self.first_step:
            pace = (time.monotonic() - self.first_time) / (done - self.first_step)
            left = f", {_clock((steps - done) * pace)} of training left"
        return (
            f"step {done} of {steps}, loss {self.step['loss']:.3f}, "
            f"{self.step['tokens_per_second']:,.0f} tokens/s{left}"
        )


class Pulse:
    """Says of every running cell what it does, through `say`, every `INTERVAL` seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.running: dict[str, _Running] = {}
        self.last = time.monotonic()

    def note(self, label: str, event: Event) -> None:
        """An event of a running cell."""
        cell = self.running.setdefault(label, _Running())
        if event["event"] == "phase":
            cell.phase, cell.step = event["phase"], None
            return
        if cell.step is None:
            cell.first_step, cell.first_time = event["step"], time.monotonic()
        cell.phase, cell.step = "train", event

    def ended(self, label: str) -> None:
        """A cell does not run any more."""
        self.running.pop(label, None)

    def beat(self) -> None:
        """Say it, if it is time to."""
        if time.monotonic() - self.last < INTERVAL:
            return
        self.last = time.monotonic()
        for label, cell in self.running.items():
            self.say(f"  {label}: {cell.text()}")


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
