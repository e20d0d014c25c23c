"""The mlflow package, set up for a store: beside finrepro.tracking.view the only importer of it."""

import os
from typing import Any

from finrepro.errors import EnvironmentFault
from finrepro.evidence.store import Store
from finrepro.runtime import process
from finrepro.tracking.index import tracking_uri


def environment(store: Store) -> dict[str, str]:
    """Environment variables of a process that opens the view: no telemetry, no notices, and no
    pooled connection, which would outlive a database file that a rebuild replaces.
    """
    return process.OFFLINE | {
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_TRACKING_URI": tracking_uri(store),
        "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    }


def load_mlflow(store: Store) -> Any:
    """The `mlflow` package, set up for the store. Raises `EnvironmentFault` if it is not
    installed.
    """
    # No notices, no traceback of an error that it raises as well.
    os.environ |= environment(store) | {"MLFLOW_LOGGING_LEVEL": "CRITICAL"}
    try:
        import mlflow
        import mlflow.store.tracking.sqlalchemy_store
        import mlflow.tracking
    except ImportError as error:
        raise EnvironmentFault(
            f"the package mlflow is missing: {error}. Install the locked packages with ./run; "
            "results are kept, and `invoke record --rebuild` shows them then."
        ) from None
    return mlflow
