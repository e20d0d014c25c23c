"""From GPUs and hours to a model and its tokens, and from a model and its tokens to hours, price
and memory. No torch.

Operations = GPUs x seconds x peak x MFU, with MFU in PaLM's convention
(finrepro.sizes.flops.model_flops); laws in finrepro.budgeting.scaling.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from finrepro.budgeting import scaling
from finrepro.catalogue.spec import Model
from finrepro.reporting.curves import Chart, Curve
from finrepro.sizes import flops, memory

HOUR = 3600.0
SPREAD, STEPS = 30.0, 60  # of the chart: sizes around the optimum, from a 30th to 30-fold


@dataclass(frozen=True)
class Machine:
    """What computes: `devices` alike, `peak` FLOP/s each, at `mfu` of it; price in USD an hour
    and device, and memory, where known.
    """

    name: str
    devices: int
    peak: float
    mfu: float
    price: float | None
    memory_bytes: float | None

    @property
    def speed(self) -> float:
        """Operations a second of all devices together."""
        return self.devices * self.peak * self.mfu

    def cost(self, hours: float) -> float | None:
        """USD for so many hours of all devices, None where no price is known."""
        return None if self.price is None else self.price * self.devices * hours


@dataclass(frozen=True)
class Request:
    """What is asked: of `hours` and `tokens` one is None. `remarks` are lines for the reader."""

    machine: Machine
    hours: float | None
    model: Model | None
    tokens: float | None
    unique: float | None
    sequence: int
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A catalogue entry trained from nothing on `tokens`: `losses` by law, `epochs` where the
    number of different tokens is given.
    """

    model: str
    parameters: int
    tokens: float
    hours: float
    price: float | None
    epochs: float | None
    losses: dict[str, float]


@dataclass(frozen=True)
class Best:
    """What a law finds best for a number of operations, and the entry nearest in size."""

    law: str
    read: str
    point: scaling.Point
    epochs: float | None
    nearest: str


def operations(machine: Machine, hours: float) -> float:
    """What the machine computes in so many hours."""
    return machine.speed * hours * HOUR


def best(computed: float, models: tuple[Model, ...], unique: float | None) -> tuple[Best, ...]:
    """The optimum of every law at so many operations; with `unique` tokens, what is beyond them
    is repeated.
    """
    found = []
    for law in scaling.laws():
        point = scaling.optimum(law, computed, unique)
        nearest = min(models, key=lambda model: abs(math.log(model.parameters / point.parameters)))
        epochs = point.tokens / unique if unique else None
        found.append(Best(law.name, law.read, point, epochs, nearest.name))
    return tuple(found)


def plan(
    machine: Machine, model: Model, tokens: float, sequence: int, unique: float | None
) -> Plan:
    """What it takes to train a model from nothing on so many tokens, in sequences of `sequence`."""
    hours = tokens * flops.model_flops(model, sequence, "palm") / machine.speed / HOUR
    losses = {
        law.name: scaling.loss(law, float(model.parameters), tokens, unique)
        for law in scaling.laws()
    }
    epochs = tokens / unique if unique else None
    return Plan(model.name, model.parameters, tokens, hours, machine.cost(hours), epochs, losses)


def affordable(machine: Machine, model: Model, hours: float, sequence: int) -> float:
    """Tokens that the machine trains a model on in so many hours."""
    return operations(machine, hours) / flops.model_flops(model, sequence, "palm")


def needed(machine: Machine, model: Model, sequence: int) -> dict[str, Any]:
    """Estimated bytes a device to train every weight, AdamW in mixed precision, a sequence at a
    time: whole, and in parts (ZeRO-3).
    """
    whole = memory.full_bytes(model, sequence)
    states = whole.total - whole.activations
    parts = states / machine.devices + whole.activations
    room = machine.memory_bytes
    fits = (
        None
        if room is None
        else "whole"
        if whole.total <= room
        else "parts"
        if parts <= room
        else "no"
    )
    return {"whole_bytes": whole.total, "parts_bytes": parts, "device_bytes": room, "fits": fits}


def chart(computed: float, models: tuple[Model, ...], unique: float | None) -> Chart:
    """The loss against the size at so many operations, a curve a law, and the catalogue's
    entries on each of them.
    """
    curves, dots = [], []
    for law in scaling.laws():
        middle = scaling.optimum(law, computed, unique).parameters
        sizes = tuple(middle * SPREAD ** (2 * step / STEPS - 1) for step in range(STEPS + 1))
        told = f"{law.title}{' (second-hand)' * (law.read == 'second-hand')}"
        curves.append(Curve(told, sizes, tuple(_at(law, size, computed, unique) for size in sizes)))
        ours = [
            float(model.parameters) for model in models if sizes[0] <= model.parameters <= sizes[-1]
        ]
        heights = tuple(_at(law, size, computed, unique) for size in ours)
        names = tuple(model.name for model in models if float(model.parameters) in ours)
        dots.append(
            Curve("", tuple(ours), heights, names if law is scaling.laws()[0] else (), dots=True)
        )
    title = f"{computed:.2e} operations" + (f", {unique:.3g} different tokens" if unique else "")
    return Chart(title, "parameters", "loss to expect [nats a token]", (*curves, *dots), "log")


def _at(law: scaling.Law, size: float, computed: float, unique: float | None) -> float:
    return scaling.loss(law, size, computed / 6 / size, unique)


def record(machine: Machine, **found: Any) -> dict[str, Any]:
    """Everything as plain values, with the source of every constant."""
    sources = {law.name: {"source": law.source, "read": law.read} for law in scaling.laws()}
    sources["repetition"] = {
        "source": scaling.repetition().source,
        "read": scaling.repetition().read,
    }
    return {"machine": asdict(machine), **found, "sources": sources}
