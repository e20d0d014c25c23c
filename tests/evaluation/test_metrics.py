"""Law: our metrics equal scikit-learn's on every table of answers, unparsable ones included,
alone and in batches.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from finrepro.evaluation.metrics import classification_scores, pair_index

SETTINGS = settings(deadline=None, derandomize=True, max_examples=80)


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[str], list[str], list[str | None]]:
    """(labels, gold, predictions): some labels may have no gold row or no prediction; None is an
    unparsable answer.
    """
    labels = [f"label{i}" for i in range(draw(st.integers(2, 5)))]
    pairs = st.tuples(st.sampled_from(labels), st.sampled_from([*labels, None, "something else"]))
    rows = draw(st.lists(pairs, min_size=1, max_size=40))
    return labels, [gold for gold, _ in rows], [answer for _, answer in rows]


def table_of(labels: list[str], gold: list[str], predicted: list[str | None]) -> np.ndarray:
    """The confusion array, counted from the pairs."""
    size = len(labels) * (len(labels) + 1)
    counts = np.bincount(pair_index(gold, predicted, labels), minlength=size)
    return counts.reshape(len(labels), -1).astype(float)


def expected(labels: list[str], gold: list[str], predicted: list[str | None]) -> dict[str, float]:
    """scikit-learn's values, an unparsable answer being a class of its own that no gold row has."""
    seen = [answer if answer in labels else "unparsable" for answer in predicted]
    every = [*labels, "unparsable"]
    matrix = reference.confusion_matrix(gold, seen, labels=every).astype(float)
    rows, columns = matrix.sum(1), matrix.sum(0)
    spread = np.sqrt(float((len(gold) ** 2 - columns @ columns) * (len(gold) ** 2 - rows @ rows)))
    return {
        "accuracy": float(reference.accuracy_score(gold, seen)),
        "f1_weighted": float(
            reference.f1_score(gold, seen, labels=labels, average="weighted", zero_division=0)
        ),
        "f1_macro": float(
            reference.f1_score(gold, seen, labels=labels, average="macro", zero_division=0)
        ),
        "mcc": float(reference.matthews_corrcoef(gold, seen)) if spread > 0 else 0.0,
        "unparsable_rate": seen.count("unparsable") / len(seen),
    }


@SETTINGS
@given(answers())
def test_every_metric_equals_scikit_learns(case: tuple[list[str], list[str], list[str | None]]):
    ours = classification_scores(table_of(*case))
    assert {key: float(value) for key, value in ours.items()} == pytest.approx(
        expected(*case), abs=1e-12
    )


@SETTINGS
@given(st.lists(answers(), min_size=2, max_size=4))
def test_a_batch_of_tables_scores_as_each_alone(
    cases: list[tuple[list[str], list[str], list[str | None]]],
):
    labels = max((case[0] for case in cases), key=len)
    tables = [table_of(labels, gold, predicted) for _, gold, predicted in cases]
    together = classification_scores(np.stack(tables))
    for position, table in enumerate(tables):
        alone = classification_scores(table)
        for name, values in together.items():
            assert values.shape == (len(tables),)
            assert values[position] == pytest.approx(float(alone[name]), abs=1e-12)


@SETTINGS
@given(answers(), st.randoms(use_true_random=False))
def test_neither_the_order_of_rows_nor_that_of_labels_matters(
    case: tuple[list[str], list[str], list[str | None]], random
):
    labels, gold, predicted = case
    before = classification_scores(table_of(*case))
    rows = list(zip(gold, predicted, strict=True))
    random.shuffle(rows)
    other = random.sample(labels, len(labels))
    after = classification_scores(table_of(other, [g for g, _ in rows], [p for _, p in rows]))
    for name, value in before.items():
        assert float(after[name]) == pytest.approx(float(value), abs=1e-12)


@SETTINGS
@given(answers())
def test_values_stay_in_their_range(case: tuple[list[str], list[str], list[str | None]]):
    scores = classification_scores(table_of(*case))
    assert all(np.isfinite(value) and value <= 1 + 1e-12 for value in scores.values())
    assert scores["mcc"] >= -1 - 1e-12 and all(
        scores[name] >= 0 for name in scores if name != "mcc"
    )


def test_an_unparsable_answer_is_wrong_and_never_dropped():
    gold = ["a", "a", "b", "b"]
    scores = classification_scores(table_of(["a", "b"], gold, ["a", None, "b", "c"]))
    assert float(scores["accuracy"]) == 0.5 and float(scores["unparsable_rate"]) == 0.5
    # The planted mutant: scored on the answers that were understood, the model looks perfect.
    kept = classification_scores(table_of(["a", "b"], ["a", "b"], ["a", "b"]))
    assert float(kept["accuracy"]) == 1.0
    assert all(
        float(scores[name]) < float(kept[name])
        for name in ("accuracy", "f1_macro", "f1_weighted", "mcc")
    )


def test_a_gold_label_that_is_not_one_of_the_labels_is_an_error():
    with pytest.raises(KeyError):
        pair_index(["c"], ["a"], ["a", "b"])


def test_rows_without_an_answer_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        pair_index(["a", "b"], ["a"], ["a", "b"])
