"""Classification metrics as functions of a confusion array, so that one line scores a thousand
bootstrap resamples at once.

A confusion array has shape (..., labels, labels + 1): rows are gold labels, columns predictions,
the last column unparsable answers. An unparsable answer is wrong for every metric. All values are
fractions in [0, 1] but `mcc`, in [-1, 1].
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def pair_index(
    gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]
) -> Int[np.ndarray, " rows"]:
    """Position of each row's (gold, prediction) pair in the flattened confusion array.

    A prediction outside `labels`, or None, falls in the last column. Raises `KeyError` for a gold
    label that is not one of `labels`.
    """
    index = {label: position for position, label in enumerate(labels)}
    width = len(labels) + 1
    column = [
        index.get(answer, len(labels)) if answer is not None else len(labels)
        for answer in predicted
    ]
    return np.array(
        [index[truth] * width + c for truth, c in zip(gold, column, strict=True)], dtype=np.int64
    )


def _per_class(
    table: Float[np.ndarray, "*batch labels outcomes"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positives, predicted counts and gold counts of each class, shape (*batch, labels)."""
    hits = np.diagonal(table[..., :-1], axis1=-2, axis2=-1)
    return hits, table[..., :-1].sum(axis=-2), table.sum(axis=-1)


def accuracy(table: Float[np.ndarray, "*batch labels outcomes"]) -> Float[np.ndarray, "*batch"]:
    """Share of rows whose prediction is the gold label."""
    hits, _, gold = _per_class(table)
    return np.asarray(hits.sum(-1) / gold.sum(-1))


def _f1(table: Float[np.ndarray, "*batch labels outcomes"]) -> Float[np.ndarray, "*batch labels"]:
    hits, predicted, gold = _per_class(table)
    total = predicted + gold
    return np.divide(2 * hits, total, out=np.zeros_like(hits, dtype=float), where=total > 0)


def f1_weighted(table: Float[np.ndarray, "*batch labels outcomes"]) -> Float[np.ndarray, "*batch"]:
    """F1 of each class, averaged with the number of its gold rows as weight."""
    gold = table.sum(-1)
    return np.asarray((_f1(table) * gold).sum(-1) / gold.sum(-1))


def f1_macro(table: Float[np.ndarray, "*batch labels outcomes"]) -> Float[np.ndarray, "*batch"]:
    """F1 of each label, averaged alike. A label that no gold row has counts as 0, as in
    scikit-learn with `labels=`.
    """
    return np.asarray(_f1(table).mean(-1))


def mcc(table: Float[np.ndarray, "*batch labels outcomes"]) -> Float[np.ndarray, "*batch"]:
    """Matthews correlation for several classes (Gorodkin, 2004), unparsable answers being a
    class of their own; 0 where undefined.
    """
    hits, _, gold = _per_class(table)
    columns = table.sum(-2)
    total = gold.sum(-1)
    covariance = np.asarray(hits.sum(-1) * total - (columns[..., :-1] * gold).sum(-1))
    spread = (total**2 - (columns**2).sum(-1)) * (total**2 - (gold**2).sum(-1))
    return np.divide(covariance, np.sqrt(spread), out=np.zeros_like(covariance), where=spread > 0)


def unparsable_rate(
    table: Float[np.ndarray, "*batch labels outcomes"],
) -> Float[np.ndarray, "*batch"]:
    """Share of rows whose answer names no label."""
    return np.asarray(table[..., -1].sum(-1) / table.sum((-2, -1)))


def classification_scores(
    table: Float[np.ndarray, "*batch labels outcomes"],
) -> dict[str, np.ndarray]:
    """Every metric of this file by name."""
    return {
        "accuracy": accuracy(table),
        "f1_weighted": f1_weighted(table),
        "f1_macro": f1_macro(table),
        "mcc": mcc(table),
        "unparsable_rate": unparsable_rate(table),
    }
