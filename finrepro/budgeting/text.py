"""A budget in words: what hours buy, what a model takes, and the sources of both. Each answer
comes with its numbers.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from finrepro.budgeting import budget, scaling
from finrepro.catalogue import reader
from finrepro.catalogue.spec import Model
from finrepro.errors import UsageError
from finrepro.sizes import flops

OURS = ("gpt2_127m", "gpt2_1_5b", "llama2_7b", "llama2_13b", "llama3_1_8b", "llama3_1_70b")
FITS = {
    "whole": "it fits one device",
    "parts": "it fits in parts (ZeRO-3), not whole",
    "no": "it does not fit, in parts or whole",
    None: "the device's memory is not known",
}


def of_hours(asked: budget.Request) -> tuple[list[str], dict[str, Any]]:
    """What so many hours buy: the best size and tokens by each law, and the tokens of each of
    our models, or of the one that is named.
    """
    machine, hours = asked.machine, asked.hours or 0.0
    computed = budget.operations(machine, hours)
    lines = [
        _head(machine, f"for {hours:g} h", computed, machine.cost(hours), hours),
        "",
        "Best size and tokens (C = 6 N D):",
    ]
    everything = tuple(map(reader.model, OURS))
    laws = budget.best(computed, everything, asked.unique)
    rows = [
        (
            _title(each.law),
            _short(each.point.parameters),
            _short(each.point.tokens),
            f"{each.point.tokens / each.point.parameters:.3g}",
            _epochs(each.epochs),
            f"{each.point.loss:.3f}",
            each.nearest,
        )
        for each in laws
    ]
    lines += _columns(
        ("law", "parameters", "tokens", "tokens a parameter", "epochs", "loss", "nearest of ours"),
        rows,
    )
    models = (asked.model,) if asked.model else everything
    plans = []
    for each in models:
        length = min(asked.sequence, flops.positions(each))
        plans.append(
            budget.plan(
                machine, each, budget.affordable(machine, each, hours, length), length, asked.unique
            )
        )
    lines += [
        "",
        f"Trained for these {hours:g} h (6 N + 12 L H Q T, sequences of {asked.sequence:,}, or what the model has positions for):",
        *_plans(plans),
    ]
    found: dict[str, Any] = {
        "best": [asdict(each) for each in laws],
        "plans": [asdict(each) for each in plans],
    }
    if asked.model:
        told, found["memory"] = _room(asked, asked.model)
        lines += ["", told]
    return lines, found | {"computed": computed}


def of_tokens(asked: budget.Request) -> tuple[list[str], dict[str, Any]]:
    """What a model and its tokens take: hours, price, memory."""
    machine, model, tokens = asked.machine, asked.model, asked.tokens or 0.0
    if model is None:
        raise UsageError("--tokens needs --model: the model that is trained on them.")
    made = budget.plan(machine, model, tokens, asked.sequence, asked.unique)
    computed = budget.operations(machine, made.hours)
    told, room = _room(asked, model)
    lines = [
        _head(
            machine, f"{model.name} on {_short(tokens)} tokens", computed, made.price, made.hours
        ),
        "",
        *_plans([made]),
        "",
        told,
    ]
    return lines, {"computed": computed, "plans": [asdict(made)], "memory": room}


def _room(asked: budget.Request, model: Model) -> tuple[str, dict[str, Any]]:
    """The line about memory, and its numbers."""
    room = budget.needed(asked.machine, model, asked.sequence)
    whole, parts = (f"{room[key] / 1e9:,.1f} GB" for key in ("whole_bytes", "parts_bytes"))
    told = f"Memory to train every weight, one sequence of {asked.sequence:,} at a time (estimated): {whole} whole"
    told += (
        f", {parts} a device in {asked.machine.devices} parts (ZeRO-3)"
        if asked.machine.devices > 1
        else ""
    )
    return f"{told}; {FITS[room['fits']]}.", room


def _head(
    machine: budget.Machine, what: str, computed: float, price: float | None, hours: float
) -> str:
    cost = (
        f"about {price:,.0f} USD at {machine.price:.2f} an hour"
        if price is not None
        else "price not known (--price USD)"
    )
    return (
        f"{machine.devices} x {machine.name} {what}: {computed:.3g} operations in {hours:,.4g} h at MFU {machine.mfu:g} "
        f"of {machine.peak / 1e12:.3g} TFLOP/s; {machine.devices * hours:,.4g} device hours, {cost}."
    )


def _plans(plans: list[budget.Plan]) -> list[str]:
    """A line a model; a column of loss a law."""
    rows = [
        (
            each.model,
            _short(float(each.parameters)),
            _short(each.tokens),
            f"{each.tokens / each.parameters:.3g}",
            _epochs(each.epochs),
            f"{each.hours:,.4g}",
            "-" if each.price is None else f"{each.price:,.0f}",
            *(f"{loss:.3f}" for loss in each.losses.values()),
        )
        for each in plans
    ]
    head = ("model", "parameters", "tokens", "tokens a parameter", "epochs", "hours", "USD")
    return _columns((*head, *(f"loss, {_title(name)}" for name in plans[0].losses)), rows)


def _columns(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    return [
        "  "
        + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


def _title(name: str) -> str:
    fit = scaling.law(name)
    return fit.title.split(" ")[0] + ("*" if fit.read == "second-hand" else "")


def sources(unique: float | None) -> list[str]:
    """What the numbers rest on."""
    worth = scaling.repetition()
    repeated = f"Repeated tokens: {worth.source}; with the other two laws an approximation (read: {worth.read})."
    return [
        "Losses are of each law's own corpus and tokenizer: compare them down a column, not across. Hoffmann's models have 70 M to 16 G "
        "parameters and saw 5 to 500 G tokens: elsewhere all is extrapolated.",
        *(f"{_title(law.name)}: {law.source} (read: {law.read})." for law in scaling.laws()),
        *([repeated] if unique else []),
    ]


def _epochs(epochs: float | None) -> str:
    return "-" if epochs is None else f"{epochs:.2g}"


def _short(value: float) -> str:
    """A large number as people say it."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
