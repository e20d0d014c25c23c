"""`invoke budget`: its options checked, its answer printed and kept under results/budget/ in the
store. Nothing is measured unasked.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finrepro.arguments import count, positive
from finrepro.budgeting import estimates, hardware
from finrepro.budgeting.text import of_hours, of_tokens, sources
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


def budget_of(place: Place, request: estimates.BudgetRequest) -> BudgetAnswer:
    """Answer a request, and keep the answer in the store."""
    lines, answer = of_hours(request) if request.hours is not None else of_tokens(request)
    folder, stem = place.store.results / "budget", _stem(request)
    computed = answer.pop("computed")
    chart = estimates.chart(computed, estimates.catalogue_models(), request.unique)
    picture = draw_charts([chart], lines[0].partition(";")[0], 1)
    values = estimates.record(
        request.cluster,
        operations=computed,
        sequence=request.sequence,
        unique=request.unique,
        **answer,
    )
    contents = {"json": json_text(values).encode(), **figure_files(picture)}
    with place.store.lock():
        write_files(place.store.root, folder / stem, contents)
    return BudgetAnswer(
        (*lines, "", *request.remarks, *sources(request.unique)), values, folder / stem
    )


def checked_request(
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
) -> estimates.BudgetRequest:
    """The options as checked values. Raises `UsageError` for the first that is wrong."""
    if (hours is None) == (tokens is None):
        raise UsageError(
            "give --hours, or --model and --tokens: the one is worked out from the other."
        )
    if tokens is not None and model is None:
        raise UsageError("--tokens needs --model: the model that is trained on them.")
    entry = _paper_model(model) if model is not None else None
    length = count("sequence", sequence)
    if entry and length > flops.positions(entry):
        raise UsageError(
            f"--sequence {length}: {entry.name} has {flops.positions(entry)} positions."
        )
    cluster, remarks = _cluster(gpu, count("gpus", gpus), positive("mfu", mfu), measure)
    if price is not None:
        cluster = replace(cluster, price=positive("price", price))
    return estimates.BudgetRequest(
        cluster=cluster,
        hours=None if hours is None else positive("hours", hours),
        model=entry,
        tokens=None if tokens is None else positive("tokens", tokens),
        unique=None if unique_tokens is None else positive("unique-tokens", unique_tokens),
        sequence=length,
        remarks=remarks,
    )


def _paper_model(name: str) -> Model:
    allowed = [
        key for key, entry in reader.entries("models").items() if entry.get("scale") == "paper"
    ]
    if name not in allowed:
        raise unknown("model", name, allowed)
    return reader.model(name)


def _cluster(
    gpu: str | None, devices: int, mfu: float, measure: bool
) -> tuple[estimates.Cluster, tuple[str, ...]]:
    """GPUs of the catalogue, or with `measure` the device at hand at the rate that its matrix
    products reach now; with remarks for the reader.
    """
    if (gpu is None) == (not measure):
        allowed = ", ".join(reader.entries("hardware"))
        raise UsageError(f"give --gpu, one of: {allowed}; or --measure, for the device at hand.")
    if gpu is None:
        rate = at_hand()
        remark = (
            f"Measured here: {rate.flops / 1e12:.3g} TFLOP/s at {'x'.join(map(str, rate.shape))} "
            f"in {rate.dtype}; MFU is a share of it."
        )
        return estimates.Cluster(rate.device, devices, rate.flops, mfu, None, None), (remark,)
    card = hardware.gpu(gpu)
    peak, measured = card.require("peak_bf16"), card.matmul_bf16
    remarks = [f"Price: {card.sources['price']}."] if card.price else []
    if measured and mfu > measured / peak:
        remarks.append(
            f"MFU {mfu:g} is out of reach: single matrix products were measured at "
            f"{measured / peak:.2f} of this GPU's peak."
        )
    capacity = None if card.memory_bytes is None else float(card.memory_bytes)
    cluster = estimates.Cluster(card.title, devices, peak, mfu, card.price, capacity)
    return cluster, tuple(remarks)


def _stem(request: estimates.BudgetRequest) -> str:
    """The name of an answer's files, made from the request: the same request, the same files."""
    cluster = request.cluster
    parts = [
        "".join(c if c.isalnum() else "_" for c in cluster.name.lower()).strip("_"),
        f"x{cluster.devices}",
        f"mfu{cluster.mfu:g}",
        f"{request.hours:g}h" if request.hours is not None else f"{request.tokens:g}_tokens",
    ]
    parts += [request.model.name] if request.model else []
    parts += [f"unique{request.unique:g}"] if request.unique else []
    parts += [f"usd{cluster.price:g}"] if cluster.price else []
    return "-".join([*parts, f"t{request.sequence}"])
