"""What one call of `reproduce` did: a file under results/campaigns, and MLflow's view of it."""

import shlex
import time
from typing import Any

from finrepro.campaigns.preview import CampaignOptions, CampaignPlan
from finrepro.catalogue.selection import Selection
from finrepro.evidence import files, provenance, store
from finrepro.evidence.sealed import sealed
from finrepro.planning.plan import Step
from finrepro.reporting.tabulate import file_stem
from finrepro.runtime.interrupts import held_back
from finrepro.tracking.index import is_shown
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
        "jobs": None if options.jobs == 1 else options.jobs,
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
        with files.disk_errors(self.place.store.root):
            files.write_json(
                self.place.store.results / "campaigns" / f"{self.record['id']}.json",
                sealed(self.record),
            )

    def show(self, step: Step) -> None:
        """Show a finished cell in MLflow, and the campaign above it."""
        self.save()
        if self.view is None:
            with held_back():  # half a database is none
                self.view = MlflowView(self.place.store)
                self.parent = self.view.campaign(self.record)
        self.view.cell(step.spec.run_id, self.record, self.parent)

    def interrupted(self) -> None:
        """Note that the campaign ends before its cells do."""
        self.record["status"] = "interrupted"

    def close(self) -> None:
        """Say how the campaign ended. One that did nothing leaves no record."""
        cells, running = self.record["cells"], self.record["status"] == "running"
        if running and all(cell["outcome"] == "kept" for cell in cells):
            return
        if running:
            failed = any(cell["status"] in (store.FAILED, store.DIVERGED) for cell in cells)
            self.record["status"] = "with failed cells" if failed else "finished"
        self.record["ended"] = time.time()
        self.save()
        if self.view is not None:
            self.view.campaign(self.record)
