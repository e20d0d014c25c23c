"""A cell's result, read as a whole before MLflow is told anything of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finrepro.errors import EnvironmentFault
from finrepro.evidence.store import SKIPPED, Store
from finrepro.tracking import notes, projection
from finrepro.tracking.index import result_digest


class Unreadable(EnvironmentFault):
    """A run's files cannot be read: it is not shown, all others are."""


@dataclass(frozen=True)
class Projected:
    """What MLflow gets of a run: texts and numbers; files are copied from its `folder`."""

    result: dict[str, Any]
    digest: str
    folder: Path
    name: str
    tags: dict[str, str]
    parameters: dict[str, str]
    metrics: list[projection.MetricPoint]
    datasets: list[tuple[str, str, str, str]]


def project(store: Store, run_id: str) -> Projected | None:
    """A run as MLflow shows it; None for one that is skipped, or is not there. Raises
    `Unreadable`.
    """
    folder = store.run_folder(run_id)
    try:
        found = store.found(run_id)
        if found.faults:
            raise ValueError(f"it is damaged: {', '.join(found.faults)}")
        result = found.result
        if result is None or result["status"] == SKIPPED:
            return None
        return Projected(
            result,
            result_digest(store, run_id),
            folder,
            projection.cell_name(result),
            projection.cell_tags(result) | {"mlflow.note.content": notes.cell_note(result, folder)},
            projection.parameters(result),
            list(projection.metrics(result, folder)),
            list(projection.datasets(result)),
        )
    # Whatever a damaged file can mean to those who read it.
    except (EnvironmentFault, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Unreadable(f"run {run_id} cannot be read and is not shown ({reason}).") from None
