"""How far a published value can be compared with a cell, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

from finrepro.catalogue.published import VARIANTS, Level, Published
from finrepro.reporting.cell_result import CellResult


@dataclass(frozen=True)
class Comparison:
    """The level of comparability of a published value with a cell, and the reasons for it."""

    level: Level
    reasons: tuple[str, ...]


def _size(model: str) -> str:
    """The model's name without its variant: a base model is a candidate beside its Instruct one."""
    return next((model.removesuffix(v) for v in VARIANTS if model.endswith(v)), model)


def _per_device(row: CellResult) -> float:
    """Examples a step and device."""
    return float(row["batch"] / row["devices"])


def candidates(
    published: Sequence[Published], row: CellResult, task: str | None, metrics: Sequence[str]
) -> list[Published]:
    """Published values that a reader would look for beside this cell: of its model's size, adapter,
    quantizer, task and metrics.

    A value that is not comparable is named so rather than left out. So the base model's stands
    beside the Instruct model, a metric beside the one that it would be taken for, and every metric
    of a test set with another question.
    """
    return [
        value
        for value in published
        if value.test_set.task == task
        and row["adapter"] in {value.system.adapter, value.system.folder}
        and (not value.system.quantizers or row["quantizer"] in value.system.quantizers)
        and _size(value.system.model) == _size(row["model"])
        and (
            (value.measure.ours or value.measure.beside) in metrics
            or value.test_set.differs is not None
        )
        and value.test_set.batch in (None, _per_device(row))
    ]


def comparability(published: Published, row: CellResult, n: int | None = None) -> Comparison:
    """Whether a cell measures what was published.

    `n`: test examples of its score, for a score.
    """
    differences = _other_quantity(published, row, n)
    if differences:
        return Comparison("not comparable", tuple(differences))
    reservations = _other_way(published, row)
    level: Level = "with reservations" if reservations else "comparable"
    return Comparison(level, tuple(reservations))


def _other_quantity(published: Published, row: CellResult, n: int | None) -> list[str]:
    """Why the cell measures something else."""
    system, test_set = published.system, published.test_set
    of_quality = test_set.task is not None
    untuned = system.adapter == "base"
    answers = published.measure.ours != "f1_entity"
    prompt = row["prompts"].get(test_set.task or "") or None
    checks = {
        "random weights here": of_quality and row["weights"] == "random",
        "trained here for too few steps to show quality": of_quality and row["short"],
        f"{system.variant} there, {row['model']} here": of_quality and system.model != row["model"],
        f"{system.method} there, {row['adapter']} here": row["adapter"]
        not in (system.adapter, system.folder),
        f"quantizer {' or '.join(system.quantizers)} there": bool(system.quantizers)
        and row["quantizer"] not in system.quantizers,
        f"{test_set.differs}": test_set.differs is not None,
        f"test set of {test_set.n} rows there, {n} here": None not in (test_set.n, n)
        and test_set.n != n,
        f"batch of {test_set.batch} there": test_set.batch not in (None, _per_device(row)),
        f"their {published.metric} is {published.measure.says}": published.measure.ours is None,
        (
            "an untuned model's score depends on how answers are read: "
            "generated text there, label likelihoods here"
        ): (
            of_quality
            and untuned
            and answers
            and test_set.differs is None  # otherwise the question itself is another
        ),
        f"prompt {test_set.prompt} there, {prompt} here": (
            untuned and None not in (prompt, test_set.prompt) and prompt != test_set.prompt
        ),
    }
    return [reason for reason, holds in checks.items() if holds]


def _other_way(published: Published, row: CellResult) -> list[str]:
    """What differs in how the same quantity was obtained."""
    system, test_set = published.system, published.test_set
    of_quality = test_set.task is not None
    retrained = row["adapter"] != system.folder
    prompt = row["prompts"].get(test_set.task or "") or None
    checks = {
        f"trained there with {system.recipe}": retrained and system.recipe is not None,
        f"trained there on: {system.trained_on}": (
            retrained and system.trained_on is not None and row["train_on"] != system.train_on
        ),
        f"{system.train_on_differs}": (
            retrained and system.train_on_differs is not None and row["train_on"] == system.train_on
        ),
        "their bits are not known": system.quantizer is None,
        f"scored there with quantizer {system.scored_with}": system.scored_with
        not in (None, row["quantizer"]),
        "answers generated there, label likelihoods here": of_quality
        and published.measure.ours != "f1_entity",
        f"prompt {test_set.prompt} there, {prompt} here": (
            None not in (prompt, test_set.prompt) and prompt != test_set.prompt
        ),
        "made here by other source or packages than today's": row["state"] == "stale",
    }
    return [*(reason for reason, holds in checks.items() if holds), *published.defects]
