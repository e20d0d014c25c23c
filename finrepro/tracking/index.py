"""What MLflow's view of a store shows by now, kept in a small file beside the view: answered
without loading MLflow, which takes seconds.
"""

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finrepro import bounds
from finrepro.evidence.files import write_json
from finrepro.evidence.store import Store
from finrepro.tracking.saved_views import link

LAYOUT = 2  # of the view; a view of another layout is made anew


def database(store: Store) -> Path:
    """MLflow's SQLite file."""
    return store.root / "mlruns" / "mlflow.db"


def tracking_uri(store: Store) -> str:
    """The explicit address of the view; MLflow's own default depends on what lies in the working
    directory.

    With its driver named: of an address without, MLflow makes a folder of what is escaped.
    """
    return f"sqlite+pysqlite:///{quote(str(database(store)))}"


def result_digest(store: Store, run_id: str) -> str:
    """What identifies a result: sha256 of its result.json, shortened to what a tag holds."""
    return hashlib.sha256((store.run_folder(run_id) / "result.json").read_bytes()).hexdigest()[:32]


def read_index(store: Store) -> dict[str, Any]:
    """`cells` (run id -> table -> digest of the result), `experiments` (name -> MLflow's id), the
    view's `layout` (None: no whole view), the `schema` of its database and the path of the
    `store` that it was made in.
    """
    empty: dict[str, Any] = {
        "store": str(store.root),
        "layout": None,
        "schema": None,
        "experiments": {},
        "cells": {},
    }
    try:
        values = bounds.read_json(database(store).parent / "shown.json")
    except (OSError, ValueError):
        return empty
    return empty | (values if isinstance(values, dict) else {})


def update_index(store: Store, **changes: Any) -> None:
    """Replace top-level keys of the index."""
    write_json(database(store).parent / "shown.json", read_index(store) | changes)


def is_shown(store: Store, run_id: str, table: str) -> bool:
    """Whether the view shows the run's current result in the experiment of `table`."""
    digests = read_index(store)["cells"].get(run_id, {})
    return is_current(store) and digests.get(table) == result_digest(store, run_id)


def is_current(store: Store) -> bool:
    """Whether there is a view of this layout, made where the store lies now (MLflow keeps absolute
    paths), and its database is of the version that it was made with.
    """
    index = read_index(store)
    made_here = (index["store"], index["layout"]) == (str(store.root), LAYOUT)
    return made_here and index["schema"] is not None and schema_version(store) == index["schema"]


def schema_version(store: Store) -> str | None:
    """The version of MLflow's tables, None where the database cannot be read."""
    address = f"file:{quote(str(database(store)))}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True)) as connection:
            return str(connection.execute("select version_num from alembic_version").fetchone()[0])
    except (sqlite3.Error, TypeError):
        return None


def links(store: Store) -> dict[str, str]:
    """Experiment -> its results below the address of MLflow's server."""
    return {name: link(key) for name, key in sorted(read_index(store)["experiments"].items())}
