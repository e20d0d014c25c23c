"""Every result of a store against its manifest."""

from dataclasses import dataclass
from pathlib import Path

from finrepro.evidence.run_faults import run_faults
from finrepro.evidence.store import Store
from finrepro.tracking import index
from finrepro.tracking.rebuilding import Rebuilt
from finrepro.tracking.rebuilding import rebuild as rebuild_view


@dataclass(frozen=True)
class StoreCheck:
    """How many results a store has, which files of which are not what was sealed (run id -> their
    names), how many lines of the list of scorings are not (a crash may have cut one off), and
    MLflow's new `view` in `database` where it was made.
    """

    results: int
    damaged: dict[str, list[str]]
    database: Path
    view: Rebuilt | None = None
    damaged_scorings: int = 0

    def show(self) -> None:
        """Print it."""
        for run_id, names in self.damaged.items():
            print(f"damaged: {run_id}: {', '.join(names)}")
        if self.damaged_scorings:
            print(f"damaged: scorings.jsonl: {self.damaged_scorings} lines")
        print(f"{self.results} results, {len(self.damaged)} damaged")
        if self.view is not None:
            for reason in self.view.left_out.values():
                print(reason)
            print(f"{self.view.cells} cells in {self.database}")


def check_store(store: Store, rebuild: bool = False) -> StoreCheck:
    """Read every file of every result; with `rebuild`, make MLflow's view again from them."""
    folders = sorted(
        path for path in (store.results / "runs").iterdir() if not path.name.startswith(".")
    )
    faults = {folder.name: run_faults(folder) for folder in folders}
    view = None
    if rebuild:
        with store.lock():
            view = rebuild_view(store)
    damaged = {run_id: names for run_id, names in faults.items() if names}
    return StoreCheck(len(folders), damaged, index.database(store), view, store.scorings.damaged())
