"""What a call of `reproduce` gives back."""

from dataclasses import dataclass, field
from pathlib import Path

from finrepro.campaigns.display import Display
from finrepro.reporting.table import Table


@dataclass(frozen=True)
class Reproduced:
    """A finished table. `states` are those of its cells by label, without the refused ones; a
    table that is computed from sizes has none. `folder` is where its files lie, and `faults` are
    those of MLflow's view, a line each. `next_step` is what a reader may run next, or empty.
    """

    table: Table
    scale: str
    folder: Path
    states: dict[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    next_step: str = ""

    def show(self) -> None:
        """Print the table, where it lies, and what may come next."""
        display = Display()
        display.table(self.table, self.folder, runs=bool(self.states))
        if self.next_step:
            display.say(self.next_step)
