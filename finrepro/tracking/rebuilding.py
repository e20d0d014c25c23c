"""MLflow's view made anew from results/: it takes the place of the old one when it is whole."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from finrepro.evidence.files import disk_errors
from finrepro.evidence.store import Store
from finrepro.tracking.index import LAYOUT, database, is_current, read_index, update_index
from finrepro.tracking.library import load_mlflow
from finrepro.tracking.projected import Unreadable
from finrepro.tracking.view import MlflowView

OLD = ".old"  # beside the new one until that is whole
INDEX = "shown.json"


@dataclass(frozen=True)
class Rebuilt:
    """How many cells a new view shows, and which it cannot, each with the reason."""

    cells: int
    left_out: dict[str, str] = field(default_factory=dict)


def open_view(store: Store) -> MlflowView:
    """MLflow's view of a store, made anew where it is of another place or version. Raises as
    `MlflowView` does.
    """
    load_mlflow(store)
    there = database(store).exists() or (database(store).parent / OLD).exists()
    if there and not is_current(store):
        rebuild(store)
    return MlflowView(store)


def rebuild(store: Store) -> Rebuilt:
    """Make the view again from results/. A run that cannot be read is left out and named; on any
    error the old view stays. Raises as `MlflowView` does.
    """
    campaigns = store.campaigns()
    load_mlflow(store)  # before anything is moved
    # A cell lies under the last campaign of its table that ran or found it.
    owner = {
        (campaign["table"], campaign["scale"], cell["run_id"]): campaign["id"]
        for campaign in campaigns
        for cell in campaign["cells"]
        if cell["outcome"] not in ("kept", "skipped")
    }
    left_out = {}
    with disk_errors(store.root), _in_place_of_the_old(database(store).parent):
        view = MlflowView(store)
        update_index(store, layout=None)  # until it is whole: one that was cut short is made again
        for campaign in campaigns:
            parent = view.campaign(campaign)
            for cell in campaign["cells"]:
                key = (campaign["table"], campaign["scale"], cell["run_id"])
                if owner.get(key) != campaign["id"]:
                    continue
                try:
                    view.cell(cell["run_id"], campaign, parent)
                except Unreadable as error:
                    left_out[cell["run_id"]] = str(error)
        view.close_abandoned()
        update_index(store, layout=LAYOUT)
    return Rebuilt(len(read_index(store)["cells"]), left_out)


@contextlib.contextmanager
def _in_place_of_the_old(folder: Path) -> Iterator[None]:
    """Inside, the folder of the view is empty, but for the old one in a folder of its own, which is
    thrown away at the end and put back on an error. One that a crash left there is older than
    what lies beside it, and whole.
    """
    old = folder / OLD
    if not old.is_dir():
        old.mkdir(parents=True)
        # Its index last: without it a view that was moved in part is made again.
        for path in sorted(_entries(folder), key=lambda path: path.name == INDEX):
            path.rename(old / path.name)
    else:
        _clear(folder)
    try:
        yield
    except BaseException:
        _clear(folder)
        for path in sorted(old.iterdir(), key=lambda path: path.name == INDEX):
            path.rename(folder / path.name)
        old.rmdir()
        raise
    shutil.rmtree(old)


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != OLD]


def _clear(folder: Path) -> None:
    for path in _entries(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
