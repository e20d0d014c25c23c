"""A cell as a message to a process that runs it, and as the command line of the launcher that
starts several.

A message says how to find the cell again, and the id and source that it must then have: two
versions of the project are never mixed.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finrepro.arguments import seed_list
from finrepro.catalogue.resolve import spec_of_label
from finrepro.catalogue.selection import SCALES, WEIGHTS, Selection
from finrepro.catalogue.spec import RunSpec, Scale
from finrepro.errors import CellFailed, UsageError
from finrepro.evidence import provenance, store
from finrepro.evidence.place import Place

Message = dict[str, Any]


def request(spec: RunSpec, selection: Selection, scale: str) -> Message:
    """The message for one cell of a selection."""
    return {
        "selection": asdict(selection),
        "scale": scale,
        "label": spec.label,
        "run_id": spec.run_id,
        "source": provenance.source_digest(),
    }


def resolve(message: Message) -> RunSpec:
    """The spec that a message means. Raises `CellFailed` when configuration or source have
    changed in between.
    """
    if message["source"] not in (None, provenance.source_digest()):
        raise CellFailed(f"{message['label']}: the source changed while the campaign was running.")
    values = message["selection"]
    selection = Selection(
        **{**values, "seeds": tuple(values["seeds"]) if values["seeds"] else None}
    )
    spec = spec_of_label(selection, message["scale"], message["label"])
    if message["run_id"] not in (None, spec.run_id):
        raise CellFailed(
            f"{message['label']}: the configuration changed while the campaign was running."
        )
    return spec


def command(spec: RunSpec, selection: Selection, scale: Scale, place: Place) -> list[str]:
    """The command line that runs the cell by itself: torchrun with a process a device, or one
    process for one device.

    It is what this program starts for several devices, and what a batch system may start instead;
    `parse` reads it.
    """
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={spec.world_size}",
    ]
    options: list[tuple[str, object]] = [
        ("--table", selection.table),
        ("--scale", scale),
        ("--cell", spec.label),
        ("--devices", spec.world_size),
        ("--weights", selection.weights if selection.weights != "pretrained" else None),
        ("--seeds", ",".join(map(str, selection.seeds)) if selection.seeds else None),
        ("--adapter", selection.adapter),
        ("--store", place.store.root),
        ("--data-dir", place.data_dir),
        ("--models-dir", place.models_dir),
    ]
    switches = [f"--{name}" for name in ("quick", "full") if getattr(selection, name)]
    words = [word for flag, value in options if value is not None for word in (flag, str(value))]
    program = [*(launcher if spec.world_size > 1 else []), "-m", "finrepro.running.cell"]
    return [sys.executable, *program, *words, *switches]


def parse(arguments: list[str] | None) -> tuple[Message, Place]:
    """The message and the place that a command line means. Raises `UsageError` or
    `EnvironmentFault`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m finrepro.running.cell", description="Run one cell; a process a device."
    )
    parser.add_argument("--table", required=True)
    parser.add_argument(
        "--scale", required=True, choices=[scale for scale in SCALES if scale != "auto"]
    )
    parser.add_argument("--cell", required=True, help="its label")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--weights", default="pretrained", choices=WEIGHTS)
    parser.add_argument("--seeds")
    parser.add_argument("--adapter")
    parser.add_argument("--devices", type=int)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--models-dir", type=Path)
    parser.add_argument("--run-id", help="refuse to run a cell with another id")
    parser.add_argument("--source", help="refuse to run with another source digest")
    options = parser.parse_args(arguments)
    if options.devices is not None and options.devices < 1:
        raise UsageError(f"--devices '{options.devices}': expected a whole number from 1.")
    selection = Selection(
        options.table,
        options.quick,
        options.full,
        None,
        None if options.seeds is None else seed_list(options.seeds),
        options.weights,
        options.devices,
        options.adapter,
    )
    message = {
        "selection": asdict(selection),
        "scale": options.scale,
        "label": options.cell,
        "run_id": options.run_id,
        "source": options.source,
    }
    folders = (path and path.absolute() for path in (options.data_dir, options.models_dir))
    return message, Place(store.open_store(options.store), *folders)
