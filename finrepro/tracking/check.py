"""Every result of a store against its manifest."""

from dataclasses import dataclass
from pathlib import Path

from finrepro.evidence.run_faults import run_faults
from finrepro.evidence.store import Store
from finrepro.tracking import index, view


@dataclass(frozen=True)
class StoreCheck:
    """How many results a store has, which files of which are not what was sealed (run id -> their
    names), and how many cells MLflow's view (`database`) shows where it was made anew.
    """

    results: int
    damaged: dict[str, list[str]]
    database: Path
    projected: int | None = None

    def show(self) -> None:
        """Print it."""
        for run_id, names in self.damaged.items():
            print(f"damaged: {run_id}: {', '.join(names)}")
        print(f"{self.results} results, {len(self.damaged)} damaged")
        if self.projected is not None:
            print(f"{self.projected} cells in {self.database}")


def check_store(store: Store, rebuild: bool = False) -> StoreCheck:
    """Read every file of every result; with `rebuild`, make MLflow's view again from them."""
    folders = sorted(
        path for path in (store.results / "runs").iterdir() if not path.name.startswith(".")
    )
    faults = {folder.name: run_faults(folder) for folder in folders}
    projected = None
    if rebuild:
        with store.lock():
            projected = view.rebuild(store)
    damaged = {run_id: names for run_id, names in faults.items() if names}
    return StoreCheck(len(folders), damaged, index.database(store), projected)
