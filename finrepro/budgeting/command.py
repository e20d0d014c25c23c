"""`invoke budget`: its options checked, its answer printed and kept under results/budget/ in the
store. Nothing is measured unasked.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finrepro.arguments import count, positive
from finrepro.budgeting import budget
from finrepro.budgeting.hardware import hardware
from finrepro.budgeting.text import OURS, of_hours, of_tokens, sources
from finrepro.catalogue import reader
from finrepro.catalogue.spec import Model
from finrepro.errors import UsageError, unknown
from finrepro.evidence.files import json_text
from finrepro.evidence.place import Place
from finrepro.reporting.curves import draw_charts
from finrepro.reporting.files import figure_files, write_files
from finrepro.runtime.matmul import at_hand
from finrepro.sizes import flops


@dataclass(frozen=True)
class BudgetAnswer:
    """An answer: `lines` for a reader, `values` with every number and source. `path`, with .json,
    .svg and .png added, is where it is kept.
    """

    lines: tuple[str, ...]
    values: dict[str, Any]
    path: Path

    def show(self) -> None:
        """Print the lines, and where the answer is kept."""
        print("\n".join([*self.lines, f"Kept: {self.path} (json, svg, png)."]))


def budget_of(place: Place, asked: budget.Request) -> BudgetAnswer:
    """Answer a request, and keep the answer in the store."""
    lines, found = of_hours(asked) if asked.hours is not None else of_tokens(asked)
    folder, stem = place.store.results / "budget", _stem(asked)
    computed = found.pop("computed")
    models = tuple(map(reader.model, OURS))
    picture = draw_charts(
        [budget.chart(computed, models, asked.unique)], lines[0].partition(";")[0], 1
    )
    values = budget.record(
        asked.machine,
        operations=computed,
        sequence=asked.sequence,
        unique=asked.unique,
        **found,
    )
    contents = {"json": json_text(values).encode(), **figure_files(picture)}
    with place.store.lock():
        write_files(place.store.root, folder / stem, contents)
    return BudgetAnswer((*lines, "", *asked.remarks, *sources(asked.unique)), values, folder / stem)


def request(
    gpu: str | None = None,
    gpus: str | int = 1,
    hours: str | float | None = None,
    mfu: str | float = 0.4,
    model: str | None = None,
    tokens: str | float | None = None,
    unique_tokens: str | float | None = None,
    sequence: str | int = 1024,
    price: str | float | None = None,
    measure: bool = False,
) -> budget.Request:
    """The checked options."""
    if (hours is None) == (tokens is None):
        raise UsageError(
            "give --hours, or --model and --tokens: the one is worked out from the other."
        )
    if tokens is not None and model is None:
        raise UsageError("--tokens needs --model: the model that is trained on them.")
    chosen = _model(model) if model is not None else None
    length = count("sequence", sequence)
    if chosen and length > flops.positions(chosen):
        raise UsageError(
            f"--sequence {length}: {chosen.name} has {flops.positions(chosen)} positions."
        )
    machine, remarks = _machine(gpu, count("gpus", gpus), positive("mfu", mfu, 1.0), measure)
    if price is not None:
        machine = budget.Machine(**asdict(machine) | {"price": positive("price", price)})
    return budget.Request(
        machine=machine,
        hours=None if hours is None else positive("hours", hours, 1e7),
        model=chosen,
        tokens=None if tokens is None else positive("tokens", tokens, 1e18),
        unique=None if unique_tokens is None else positive("unique-tokens", unique_tokens, 1e18),
        sequence=length,
        remarks=remarks,
    )


def _model(name: str) -> Model:
    known = [
        each for each, entry in reader.catalogue("models").items() if entry.get("scale") == "paper"
    ]
    if name not in known:
        raise unknown("model", name, known)
    return reader.model(name)


def _machine(
    gpu: str | None, devices: int, mfu: float, measure: bool
) -> tuple[budget.Machine, tuple[str, ...]]:
    """The GPU of the catalogue, or with `measure` the device at hand at the rate that its matrix
    products reach now.
    """
    if (gpu is None) == (not measure):
        known = ", ".join(reader.catalogue("hardware"))
        raise UsageError(f"give --gpu, one of: {known}; or --measure, for the device at hand.")
    if gpu is None:
        rate = at_hand()
        shape = "x".join(map(str, rate.shape))
        told = f"Measured here: {rate.flops / 1e12:.3g} TFLOP/s at {shape} in {rate.dtype}; MFU is a share of it."
        return budget.Machine(rate.device, devices, rate.flops, mfu, None, None), (told,)
    found = hardware(gpu)
    peak, most = found.known("peak_bf16"), found.matmul_bf16
    remarks = [f"Price: {found.sources['price']}."] if found.price else []
    if most and mfu > most / peak:
        remarks.append(
            f"MFU {mfu:g} is out of reach: single matrix products were measured at {most / peak:.2f} of this GPU's peak."
        )
    room = None if found.memory_bytes is None else float(found.memory_bytes)
    return budget.Machine(found.title, devices, peak, mfu, found.price, room), tuple(remarks)


def _stem(asked: budget.Request) -> str:
    """A file's name from what was asked."""
    parts = [
        "".join(c if c.isalnum() else "_" for c in asked.machine.name.lower()).strip("_"),
        f"x{asked.machine.devices}",
    ]
    parts += [
        f"mfu{asked.machine.mfu:g}",
        f"{asked.hours:g}h" if asked.hours is not None else f"{asked.tokens:g}_tokens",
    ]
    parts += [asked.model.name] if asked.model else []
    parts += [f"unique{asked.unique:g}"] if asked.unique else []
    parts += [f"usd{asked.machine.price:g}"] if asked.machine.price else []
    return "-".join([*parts, f"t{asked.sequence}"])
