"""What one call of `reproduce` did: a file under results/campaigns, and MLflow's view of it."""

import shlex
import time
from collections.abc import Callable
from typing import Any

from finrepro.campaigns.display import program
from finrepro.campaigns.preview import CampaignOptions, CampaignPlan
from finrepro.catalogue.selection import Selection
from finrepro.errors import DiskFull
from finrepro.evidence import files, provenance, store
from finrepro.evidence.files import disk_errors
from finrepro.evidence.sealed import sealed
from finrepro.planning.plan import Step
from finrepro.reporting.tabulate import file_stem
from finrepro.tracking.index import is_shown
from finrepro.tracking.projected import Unreadable
from finrepro.tracking.rebuilding import open_view, rebuild
from finrepro.tracking.view import MlflowView


def command_line(selection: Selection, options: CampaignOptions) -> str:
    """The command of a campaign, also of one that was called from Python; without folders, which
    are this machine's.
    """
    words = [
        "reproduce",
        "--table",
        selection.table.removeprefix("table"),
        "--scale",
        options.scale,
    ]
    values = {
        "only": selection.only,
        "seeds": ",".join(map(str, selection.seeds or ())),
        "weights": None if selection.weights == "pretrained" else selection.weights,
        "devices": selection.world_size,
        "adapter": selection.adapter,
        "jobs": options.jobs,
    }
    switches = {"quick": selection.quick, "full": selection.full, "keep": options.keep}
    words += [f"--{name}" for name, is_on in switches.items() if is_on]
    return shlex.join(
        [
            *words,
            *(
                word
                for name, value in values.items()
                if value
                for word in (f"--{name}", str(value))
            ),
        ]
    )


class CampaignLog:
    """The record of a campaign, and its cells in MLflow. `status` is `running` until it ends."""

    def __init__(self, plan: CampaignPlan, options: CampaignOptions) -> None:
        self.place = plan.place
        self.view: MlflowView | None = None
        self.parent = ""
        self.is_unusable = False
        self.faults: list[str] = []  # of the view, a line each
        started = time.time()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(started))
        self.record: dict[str, Any] = {
            "id": f"{stamp}-{provenance.source_digest()[:6]}",
            "table": f"table{plan.selection.table.removeprefix('table')}",
            "scale": plan.scale,
            "status": "running",
            "command": command_line(plan.selection, options),
            "started": started,
            "ended": started,
            "cells": [],
            "rendered": file_stem(plan.selection),
            "environment": provenance.environment(),
        }

    def note(self, step: Step, outcome: str, status: str) -> None:
        """Add a cell: what this campaign did with it, and its state."""
        self.record["cells"].append(
            {
                "label": step.spec.label,
                "run_id": step.spec.run_id,
                "outcome": outcome,
                "status": status,
            }
        )

    def note_finished(self, step: Step) -> None:
        """Add a cell whose result was there already. One that an earlier campaign finished and was
        cut off before it could show is shown now; one that is damaged is not.
        """
        if step.state == store.DAMAGED:
            self.note(step, "kept", step.state)
            return
        in_view = is_shown(self.place.store, step.spec.run_id, self.record["table"])
        self.note(step, "kept" if in_view else "found", step.state)
        if not in_view:
            self.show(step)

    def save(self) -> None:
        """Write the record. Raises `EnvironmentFault` where the disk is full."""
        with disk_errors(self.place.store.root):
            files.write_json(
                self.place.store.results / "campaigns" / f"{self.record['id']}.json",
                sealed(self.record),
            )

    def show(self, step: Step) -> None:
        """Show a finished cell in MLflow, and the campaign above it. Raises `DiskFull`."""
        self.save()
        self.write(lambda view, parent: view.cell(step.spec.run_id, self.record, parent))

    def write(self, write: Callable[[MlflowView, str], object]) -> None:
        """Write into the view, with the campaign's own run in it. One that cannot be written is
        made anew, once; where that does not help, `faults` says so and the campaign goes on.
        """
        if self.is_unusable:
            return
        try:
            with disk_errors(self.place.store.root):
                try:
                    write(*self._opened())
                except (DiskFull, Unreadable):
                    raise
                except Exception:  # MLflow's, SQLAlchemy's, SQLite's and the system's own
                    rebuild(self.place.store)
                    self.view = None
                    write(*self._opened())
        except DiskFull:
            raise
        except Unreadable as error:
            self.faults.append(str(error))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            self.is_unusable = True
            self.faults.append(
                f"MLflow's view cannot be written ({reason}); results are kept, and "
                f"`{program()} record --rebuild` makes it again."
            )

    def _opened(self) -> tuple[MlflowView, str]:
        """The view, and the campaign's run in it."""
        if self.view is None:
            self.view = open_view(self.place.store)
            self.parent = self.view.campaign(self.record)
        return self.view, self.parent

    def close(self, whole: bool) -> None:
        """Say how the campaign ended: as a `whole`, or before its cells did. One that did nothing
        leaves no record.
        """
        cells = self.record["cells"]
        if whole and all(cell["outcome"] == "kept" for cell in cells):
            return
        self.record["status"] = "interrupted"
        if whole:
            failed = any(cell["status"] in (store.FAILED, store.DIVERGED) for cell in cells)
            self.record["status"] = "with failed cells" if failed else "finished"
        self.record["ended"] = time.time()
        self.save()
        if self.view is not None:
            self.write(lambda view, _: view.campaign(self.record))
