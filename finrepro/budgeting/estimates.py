"""From GPUs and hours to a model and its tokens, and from a model and its tokens to hours, price
and memory. No torch.

FLOPs = GPUs x seconds x peak x MFU, with MFU in PaLM's convention
(finrepro.sizes.flops.model_flops); the laws are in finrepro.budgeting.scaling.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from finrepro.budgeting import scaling
from finrepro.catalogue import reader
from finrepro.catalogue.spec import Model
from finrepro.reporting.curves import Chart, Curve
from finrepro.sizes import flops, memory

HOUR = 3600.0  # seconds
SPREAD, STEPS = 30.0, 60  # of the chart: sizes around the optimum, from a 30th to 30-fold


@dataclass(frozen=True)
class Cluster:
    """`devices` GPUs alike: `peak` FLOP/s each, of which training reaches the share `mfu`; `price`
    in USD an hour and device, and memory of a device in bytes, None where unknown.
    """

    name: str
    devices: int
    peak: float
    mfu: float
    price: float | None
    memory_bytes: float | None

    @property
    def speed(self) -> float:
        """FLOP/s of all devices together."""
        return self.devices * self.peak * self.mfu

    def cost(self, hours: float) -> float | None:
        """USD for `hours` of all devices, None where no price is known."""
        return None if self.price is None else self.price * self.devices * hours


@dataclass(frozen=True)
class BudgetRequest:
    """The checked options of `invoke budget`: exactly one of `hours` and `tokens` is None.

    `unique` is the number of different tokens, `sequence` the tokens of a sequence, and `remarks`
    are lines for the reader.
    """

    cluster: Cluster
    hours: float | None
    model: Model | None
    tokens: float | None
    unique: float | None
    sequence: int
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class TrainingEstimate:
    """A catalogue entry pretrained on `tokens`: hours, USD, the loss by law (nats a token), and
    the epochs where the number of different tokens is known.
    """

    model: str
    parameters: int
    tokens: float
    hours: float
    price: float | None
    epochs: float | None
    losses: dict[str, float]


@dataclass(frozen=True)
class LawOptimum:
    """The compute-optimal `point` of one law, and the catalogue entry nearest to it in size."""

    law: str
    read: str
    point: scaling.Optimum
    epochs: float | None
    nearest: str


def catalogue_models() -> tuple[Model, ...]:
    """The models that a budget compares: the base models of the paper that have a hub address, in
    the catalogue's order. Low-rank, size-matched and chat variants are left out.
    """
    names = (
        name
        for name, entry in reader.entries("models").items()
        if entry.get("scale") == "paper" and entry.get("variant") == "base" and entry.get("hub")
    )
    return tuple(map(reader.model, names))


def operations(cluster: Cluster, hours: float) -> float:
    """FLOPs that the cluster computes in `hours`."""
    return cluster.speed * hours * HOUR


def optima(
    compute: float, models: tuple[Model, ...], unique: float | None
) -> tuple[LawOptimum, ...]:
    """The optimum of every law at `compute` FLOPs; tokens beyond `unique` ones are repeated."""
    points = []
    for law in scaling.laws():
        point = scaling.optimum(law, compute, unique)
        nearest = min(models, key=lambda model: abs(math.log(model.parameters / point.parameters)))
        epochs = point.tokens / unique if unique else None
        points.append(LawOptimum(law.name, law.read, point, epochs, nearest.name))
    return tuple(points)


def training_estimate(
    cluster: Cluster, model: Model, tokens: float, sequence: int, unique: float | None
) -> TrainingEstimate:
    """What it takes to pretrain a model on `tokens`, in sequences of `sequence`."""
    hours = tokens * flops.model_flops(model, sequence, "palm") / cluster.speed / HOUR
    losses = {
        law.name: scaling.loss(law, float(model.parameters), tokens, unique)
        for law in scaling.laws()
    }
    epochs = tokens / unique if unique else None
    return TrainingEstimate(
        model.name, model.parameters, tokens, hours, cluster.cost(hours), epochs, losses
    )


def affordable(cluster: Cluster, model: Model, hours: float, sequence: int) -> float:
    """Tokens that the cluster trains a model on in `hours`."""
    return operations(cluster, hours) / flops.model_flops(model, sequence, "palm")


def training_memory(cluster: Cluster, model: Model, sequence: int) -> dict[str, Any]:
    """Estimated bytes a device to train every weight with AdamW in mixed precision, one sequence at
    a time: replicated (`whole`), and sharded over the devices by ZeRO-3 (`parts`).
    """
    replicated = memory.full_bytes(model, sequence)
    states = replicated.total - replicated.activations
    sharded = states / cluster.devices + replicated.activations
    capacity = cluster.memory_bytes
    fits = (
        None
        if capacity is None
        else "whole"
        if replicated.total <= capacity
        else "parts"
        if sharded <= capacity
        else "no"
    )
    return {
        "whole_bytes": replicated.total,
        "parts_bytes": sharded,
        "device_bytes": capacity,
        "fits": fits,
    }


def chart(compute: float, models: tuple[Model, ...], unique: float | None) -> Chart:
    """The loss against the size at `compute` FLOPs: a curve a law, and the models as its dots."""
    curves, dots = [], []
    for law in scaling.laws():
        middle = scaling.optimum(law, compute, unique).parameters
        sizes = tuple(middle * SPREAD ** (2 * step / STEPS - 1) for step in range(STEPS + 1))
        name = f"{law.title}{' (second-hand)' * (law.read == 'second-hand')}"
        curves.append(
            Curve(name, sizes, tuple(_loss(law, size, compute, unique) for size in sizes))
        )
        drawn = [model for model in models if sizes[0] <= model.parameters <= sizes[-1]]
        model_sizes = tuple(float(model.parameters) for model in drawn)
        losses = tuple(_loss(law, size, compute, unique) for size in model_sizes)
        labels = tuple(model.name for model in drawn) if law is scaling.laws()[0] else ()
        dots.append(Curve("", model_sizes, losses, labels, dots=True))
    title = f"{compute:.2e} operations" + (f", {unique:.3g} different tokens" if unique else "")
    return Chart(title, "parameters", "loss to expect [nats a token]", (*curves, *dots), "log")


def _loss(law: scaling.Law, size: float, compute: float, unique: float | None) -> float:
    """The loss of `size` parameters on the tokens that `compute` = 6 N D leaves for them."""
    return scaling.loss(law, size, compute / 6 / size, unique)


def record(cluster: Cluster, **values: Any) -> dict[str, Any]:
    """The answer as plain values, with the source of every constant."""
    sources = {law.name: {"source": law.source, "read": law.read} for law in scaling.laws()}
    sources["repetition"] = {
        "source": scaling.repetition().source,
        "read": scaling.repetition().read,
    }
    return {"machine": asdict(cluster), **values, "sources": sources}
