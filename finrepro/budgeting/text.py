"""A budget in words: what hours buy, what a model takes, and the sources of both. Each answer
comes with its numbers.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from finrepro.budgeting import estimates, scaling
from finrepro.budgeting.estimates import BudgetRequest, Cluster, LawOptimum, TrainingEstimate
from finrepro.catalogue.spec import Model
from finrepro.errors import UsageError
from finrepro.sizes import flops

FITS = {
    "whole": "it fits one device",
    "parts": "it fits in parts (ZeRO-3), not whole",
    "no": "it does not fit, in parts or whole",
    None: "the device's memory is not known",
}


def of_hours(request: BudgetRequest) -> tuple[list[str], dict[str, Any]]:
    """What hours buy: the best size and tokens by each law, and the tokens of each of our models,
    or of the one that is named. The lines, and their numbers with the FLOPs as `computed`.
    """
    cluster, hours = request.cluster, request.hours or 0.0
    compute = estimates.operations(cluster, hours)
    catalogue = estimates.catalogue_models()
    laws = estimates.optima(compute, catalogue, request.unique)
    trained = [
        _trained_for(request, model, hours)
        for model in ((request.model,) if request.model else catalogue)
    ]
    lines = [
        _head(cluster, f"for {hours:g} h", compute, cluster.cost(hours), hours),
        "",
        "Best size and tokens (C = 6 N D):",
        *_optima(laws),
        "",
        f"Trained for these {hours:g} h (6 N + 12 L H Q T, sequences of {request.sequence:,}, or "
        "what the model has positions for):",
        *_trainings(trained),
    ]
    numbers: dict[str, Any] = {
        "best": [asdict(optimum) for optimum in laws],
        "plans": [asdict(estimate) for estimate in trained],
    }
    if request.model:
        sentence, numbers["memory"] = _memory(request, request.model)
        lines += ["", sentence]
    return lines, numbers | {"computed": compute}


def _trained_for(request: BudgetRequest, model: Model, hours: float) -> TrainingEstimate:
    """A model trained for `hours`, on the tokens that they pay for."""
    length = min(request.sequence, flops.positions(model))
    tokens = estimates.affordable(request.cluster, model, hours, length)
    return estimates.training_estimate(request.cluster, model, tokens, length, request.unique)


def of_tokens(request: BudgetRequest) -> tuple[list[str], dict[str, Any]]:
    """What a model and its tokens take: hours, price and memory; as `of_hours`."""
    cluster, model, tokens = request.cluster, request.model, request.tokens or 0.0
    if model is None:
        raise UsageError("--tokens needs --model: the model that is trained on them.")
    estimate = estimates.training_estimate(cluster, model, tokens, request.sequence, request.unique)
    compute = estimates.operations(cluster, estimate.hours)
    sentence, memory = _memory(request, model)
    subject = f"{model.name} on {_short(tokens)} tokens"
    lines = [
        _head(cluster, subject, compute, estimate.price, estimate.hours),
        "",
        *_trainings([estimate]),
        "",
        sentence,
    ]
    return lines, {"computed": compute, "plans": [asdict(estimate)], "memory": memory}


def _memory(request: BudgetRequest, model: Model) -> tuple[str, dict[str, Any]]:
    """The sentence about memory, and its numbers."""
    memory, devices = (
        estimates.training_memory(request.cluster, model, request.sequence),
        request.cluster.devices,
    )
    replicated, sharded = (f"{memory[key] / 1e9:,.1f} GB" for key in ("whole_bytes", "parts_bytes"))
    parts = f", {sharded} a device in {devices} parts (ZeRO-3)" if devices > 1 else ""
    return (
        f"Memory to train every weight, one sequence of {request.sequence:,} at a time "
        f"(estimated): {replicated} whole{parts}; {FITS[memory['fits']]}."
    ), memory


def _head(cluster: Cluster, subject: str, compute: float, price: float | None, hours: float) -> str:
    cost = (
        f"about {price:,.0f} USD at {cluster.price:.2f} an hour"
        if price is not None
        else "price not known (--price USD)"
    )
    return (
        f"{cluster.devices} x {cluster.name} {subject}: {compute:.3g} operations in "
        f"{hours:,.4g} h at MFU {cluster.mfu:g} of {cluster.peak / 1e12:.3g} TFLOP/s; "
        f"{cluster.devices * hours:,.4g} device hours, {cost}."
    )


def _optima(laws: Sequence[LawOptimum]) -> list[str]:
    """A line a law."""
    head = ("law", "parameters", "tokens", "tokens a parameter", "epochs", "loss")
    rows = [
        (
            _title(optimum.law),
            _short(optimum.point.parameters),
            _short(optimum.point.tokens),
            f"{optimum.point.tokens / optimum.point.parameters:.3g}",
            _epochs(optimum.epochs),
            f"{optimum.point.loss:.3f}",
            optimum.nearest,
        )
        for optimum in laws
    ]
    return _columns((*head, "nearest of ours"), rows)


def _trainings(trained: Sequence[TrainingEstimate]) -> list[str]:
    """A line a model; a column of loss a law."""
    head = ("model", "parameters", "tokens", "tokens a parameter", "epochs", "hours", "USD")
    rows = [
        (
            estimate.model,
            _short(float(estimate.parameters)),
            _short(estimate.tokens),
            f"{estimate.tokens / estimate.parameters:.3g}",
            _epochs(estimate.epochs),
            f"{estimate.hours:,.4g}",
            "-" if estimate.price is None else f"{estimate.price:,.0f}",
            *(f"{loss:.3f}" for loss in estimate.losses.values()),
        )
        for estimate in trained
    ]
    return _columns((*head, *(f"loss, {_title(name)}" for name in trained[0].losses)), rows)


def _columns(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of cells padded to their column's width, indented by two blanks."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]


def _title(name: str) -> str:
    law = scaling.law(name)
    return law.title.split(" ")[0] + ("*" if law.read == "second-hand" else "")


def sources(unique: float | None) -> list[str]:
    """What the numbers rest on; with `unique` also the law of repeated tokens."""
    repetition = scaling.repetition()
    repeated = (
        f"Repeated tokens: {repetition.source}; with the other two laws an approximation "
        f"(read: {repetition.read})."
    )
    return [
        "Losses are of each law's own corpus and tokenizer: compare them down a column, not "
        "across. Hoffmann's models have 70 M to 16 G parameters and saw 5 to 500 G tokens: "
        "elsewhere all is extrapolated.",
        *(f"{_title(law.name)}: {law.source} (read: {law.read})." for law in scaling.laws()),
        *([repeated] if unique else []),
    ]


def _epochs(epochs: float | None) -> str:
    return "-" if epochs is None else f"{epochs:.2g}"


def _short(value: float) -> str:
    """A large number as people say it: 33.6 G."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
