"""Evaluation. The law: one row an example, in their order, whose prediction is the likeliest
choice; every score can be computed again from the rows as they lie in their file; beside each
stands the best constant answer and the gain over it."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import (
    EVALUATION,
    MINIATURES,
    all_logits,
    answer_log_likelihood,
    broken,
    images,
    make,
    process,  # noqa: F401
    real_examples,
    spec_of,
    stir,
    stirred,
    tokenizer,
)
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn

from finrepro.catalogue import reader
from finrepro.data.examples import Example
from finrepro.data.tokens import Encoded, cut
from finrepro.errors import EnvironmentFault, NotFinite
from finrepro.evaluation.evaluate import Evaluated, Row, evaluate, score_rows
from finrepro.evaluation.log_likelihood import choice_log_likelihoods
from finrepro.kinds import kind_module
from finrepro.models.end_tokens import end_tokens

COUNT = 60
TASK, TEXT = reader.task("tfns", "short"), reader.task("tfns_text")
LABELS = TASK.task.config.labels
everywhere = pytest.mark.parametrize("name", MINIATURES)


@cache
def examples() -> list[Example]:
    return real_examples(COUNT)


def evaluated(model: nn.Module, name: str, task: Any = TASK, **changes: Any) -> Evaluated:
    settings = dataclasses.replace(EVALUATION, **changes)
    return evaluate(model, tokenizer(reader.model(name).family), task, examples(), settings, 128)


@cache
def result(name: str) -> Evaluated:
    return evaluated(stirred(name), name)


def by_metric(scores: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert len({score["metric"] for score in scores}) == len(scores)
    return {score["metric"]: score for score in scores}


def rows_are_of_their_examples(rows: list[Row]) -> None:
    """A row an example, in the examples' order, with the example's own gold label."""
    assert [(row["id"], row["gold"]) for row in rows] == [
        (example.id, example.label) for example in examples()
    ]
    assert {row["task"] for row in rows} == {"tfns"}


@everywhere
def test_rows_stand_in_the_order_of_the_examples(name: str) -> None:
    rows = result(name).rows
    lengths = [len(example.text) for example in examples()]
    assert lengths != sorted(lengths)
    rows_are_of_their_examples(rows)
    order = np.argsort(lengths)
    broken(rows_are_of_their_examples, [rows[i] for i in order])  # as they were computed
    broken(rows_are_of_their_examples, rows[:-1])


@torch.no_grad()
def rows_hold_the_plain_numbers(model: nn.Module, name: str, rows: list[Row]) -> None:
    """Each row's log-probabilities are those of its own text, and the prediction is the largest."""
    tokens: Any = tokenizer(reader.model(name).family)
    for row, example in zip(rows, examples(), strict=True):
        prompt = f"{example.text}\nSentiment:"
        head = tokens(prompt)["input_ids"]
        assert list(row["logprobs"]) == list(LABELS)
        for label, value in row["logprobs"].items():
            ids = tokens(f"{prompt} {label}")["input_ids"]
            excess = max(0, len(ids) - 128)
            keep = int(head[0] == tokens.bos_token_id)
            ids = ids[:keep] + ids[keep + excess :]
            expected = answer_log_likelihood(model, Encoded(tuple(ids), len(head) - excess))
            assert value == pytest.approx(float(expected), rel=1e-4)
        assert row["prediction"] == max(row["logprobs"], key=lambda label: row["logprobs"][label])


@everywhere
def test_a_prediction_is_the_likeliest_choice_of_its_own_text(name: str) -> None:
    model, rows = stirred(name).eval(), result(name).rows
    assert len({row["prediction"] for row in rows}) > 1
    rows_hold_the_plain_numbers(model, name, rows)
    broken(rows_hold_the_plain_numbers, model, name, [*rows[1:], rows[0]])
    worst = [{**row, "prediction": min(row["logprobs"], key=row["logprobs"].get)} for row in rows]
    broken(rows_hold_the_plain_numbers, model, name, worst)


@everywhere
def test_the_size_of_a_batch_changes_no_prediction(name: str) -> None:
    rows = evaluated(stirred(name), name, max_tokens=1).rows
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in result(name).rows]


@everywhere
def test_the_answers_are_the_same_whether_training_was_checkpointed(name: str) -> None:
    models = [
        stir(make(spec_of(name, "lora_r8", "nf4", activation_checkpointing=flag)).model)
        for flag in (False, True)
    ]
    plain, checkpointed = (evaluated(model, name).rows for model in models)
    assert plain == checkpointed
    assert any(
        row["logprobs"] != other["logprobs"]
        for row, other in zip(plain, result(name).rows, strict=True)
    )


@everywhere
def test_evaluation_leaves_the_model_in_evaluation_mode_and_its_weights_alone(name: str) -> None:
    model = stirred(name, "lora_r8", "nf4")
    before = images(model.named_parameters())
    evaluated(model, name)
    assert not any(module.training for module in model.modules())
    assert images(model.named_parameters()) == before


def scores_come_from(rows: list[Row], scores: list[dict[str, Any]]) -> None:
    """The scores are, to the last digit, those of the rows after a round trip through their
    file.
    """
    written = "\n".join(json.dumps(row) for row in rows)
    again = score_rows(
        TASK, examples(), [json.loads(line) for line in written.splitlines()], EVALUATION
    )
    assert json.dumps(again) == json.dumps(scores)


@everywhere
def test_scores_can_be_computed_again_from_the_rows_on_disk(name: str) -> None:
    scores_come_from(result(name).rows, result(name).scores)
    flipped = [dict(row) for row in result(name).rows]
    flipped[0]["prediction"] = next(label for label in LABELS if label != flipped[0]["prediction"])
    broken(scores_come_from, flipped, result(name).scores)


def answered(predictions: list[str | None]) -> list[Row]:
    """Rows with given predictions."""
    return [
        {"task": "tfns", "id": example.id, "gold": example.label, "prediction": prediction}
        for example, prediction in zip(examples(), predictions, strict=True)
    ]


def values_are_scikit_learns(rows: list[Row], scores: list[dict[str, Any]]) -> None:
    """Each metric equals scikit-learn's on the rows."""
    gold, predicted = (
        [row["gold"] for row in rows],
        [row["prediction"] or "unparsable" for row in rows],
    )
    expected = {
        "accuracy": accuracy_score(gold, predicted),
        "f1_weighted": f1_score(
            gold, predicted, labels=list(LABELS), average="weighted", zero_division=0
        ),
        "f1_macro": f1_score(
            gold, predicted, labels=list(LABELS), average="macro", zero_division=0
        ),
        "mcc": matthews_corrcoef(gold, predicted),
        "unparsable_rate": predicted.count("unparsable") / len(rows),
    }
    assert {score["metric"]: score["value"] for score in scores} == pytest.approx(expected)
    assert all(score["n"] == len(rows) for score in scores)


@everywhere
def test_values_are_scikit_learns(name: str) -> None:
    rows = result(name).rows
    values_are_scikit_learns(rows, result(name).scores)
    broken(
        values_are_scikit_learns,
        answered([example.label for example in examples()]),
        result(name).scores,
    )


def test_an_unparsable_answer_counts_as_wrong_and_is_never_dropped() -> None:
    gold: list[str | None] = [example.label for example in examples()]
    rows = answered([None, None, None, *gold[3:]])
    scores = score_rows(TASK, examples(), rows, EVALUATION)
    values_are_scikit_learns(rows, scores)
    assert by_metric(scores)["accuracy"]["value"] == pytest.approx(1 - 3 / COUNT)
    assert by_metric(scores)["unparsable_rate"]["value"] == pytest.approx(3 / COUNT)


def constants_are_the_best(scores: list[dict[str, Any]]) -> None:
    """Beside each value stands what the best single label would give, by trying each, and the
    difference to it.
    """
    found = by_metric(scores)
    alternatives = {
        label: by_metric(score_rows(TASK, examples(), answered([label] * COUNT), EVALUATION))
        for label in LABELS
    }
    for metric, score in found.items():
        pick = min if metric == "unparsable_rate" else max
        best = pick(alternatives[label][metric]["value"] for label in LABELS)
        assert score["constant"] == pytest.approx(best)
        assert alternatives[score["constant_answer"]][metric]["value"] == pytest.approx(best)
        assert score["gain"] == pytest.approx(score["value"] - best)
        assert score["gain_low"] <= score["gain"] <= score["gain_high"]
        assert score["low"] <= score["value"] <= score["high"]


@everywhere
def test_the_best_constant_answer_stands_beside_every_score(name: str) -> None:
    constants_are_the_best(result(name).scores)
    majority = Counter(example.label for example in examples()).most_common(1)[0]
    accuracy = by_metric(result(name).scores)["accuracy"]
    assert (accuracy["constant_answer"], accuracy["constant"]) == (
        majority[0],
        pytest.approx(majority[1] / COUNT),
    )
    for mutant in (
        {"constant": 0.0},
        {"gain": 0.0},
        {"constant_answer": "positive", "constant": 0.9},
    ):
        broken(constants_are_the_best, [result(name).scores[0] | mutant, *result(name).scores[1:]])


def test_the_oracle_gains_surely_and_the_constant_answer_gains_exactly_nothing() -> None:
    oracle = by_metric(
        score_rows(TASK, examples(), answered([e.label for e in examples()]), EVALUATION)
    )
    assert (
        oracle["accuracy"]["value"] == oracle["f1_macro"]["value"] == oracle["mcc"]["value"] == 1.0
    )
    assert oracle["accuracy"]["gain_low"] > 0
    label = oracle["accuracy"]["constant_answer"]
    constant = by_metric(score_rows(TASK, examples(), answered([label] * COUNT), EVALUATION))
    assert [constant["accuracy"][key] for key in ("gain", "gain_low", "gain_high")] == [
        0.0,
        0.0,
        0.0,
    ]
    assert (
        constant["accuracy"]["low"] < constant["accuracy"]["value"] < constant["accuracy"]["high"]
    )


def gain_interval_is_paired(scores: list[dict[str, Any]], rows: list[Row]) -> None:
    """The gain's interval is that of the per-example differences under a plain bootstrap, up to
    the resamples drawn.
    """
    accuracy = by_metric(scores)["accuracy"]
    right = np.array([row["prediction"] == row["gold"] for row in rows], dtype=float)
    constant = np.array([accuracy["constant_answer"] == row["gold"] for row in rows], dtype=float)
    generator = np.random.default_rng(1)
    draws = generator.integers(0, COUNT, size=(4000, COUNT))
    low, high = np.quantile((right - constant)[draws].mean(1), [0.025, 0.975])
    assert accuracy["gain_low"] == pytest.approx(low, abs=0.04)
    assert accuracy["gain_high"] == pytest.approx(high, abs=0.04)


def test_gains_are_compared_example_by_example() -> None:
    """Answers that agree with the constant but on a few examples: the paired interval is narrow,
    the unpaired one would be wide.
    """
    majority = Counter(example.label for example in examples()).most_common(1)[0][0]
    predictions: list[str | None] = [
        e.label if i % 10 == 0 else majority for i, e in enumerate(examples())
    ]
    rows = answered(predictions)
    scores = score_rows(TASK, examples(), rows, dataclasses.replace(EVALUATION, resamples=4000))
    gain_interval_is_paired(scores, rows)
    accuracy = by_metric(scores)["accuracy"]
    unpaired = accuracy | {
        "gain_low": accuracy["low"] - accuracy["constant"],
        "gain_high": accuracy["high"] - accuracy["constant"],
    }
    broken(gain_interval_is_paired, [unpaired], rows)


def test_equal_texts_are_one_observation_in_the_bootstrap() -> None:
    predictions: list[str | None] = [
        e.label if i % 2 else "neutral" for i, e in enumerate(examples())
    ]
    rows, twice = answered(predictions), [e for e in examples() for _ in range(4)]
    single = by_metric(score_rows(TASK, examples(), rows, EVALUATION))["accuracy"]
    fourfold = by_metric(
        score_rows(TASK, twice, [row for row in rows for _ in range(4)], EVALUATION)
    )["accuracy"]
    assert (fourfold["value"], fourfold["n"]) == (pytest.approx(single["value"]), 4 * COUNT)
    assert (fourfold["low"], fourfold["high"]) == (
        pytest.approx(single["low"]),
        pytest.approx(single["high"]),
    )


@everywhere
def test_the_score_of_text_is_its_perplexity_per_token(name: str) -> None:
    model = stirred(name)
    found = evaluated(model, name, TEXT)
    tokens: Any = tokenizer(reader.model(name).family)
    assert [row["id"] for row in found.rows] == [example.id for example in examples()]
    total, count, size = 0.0, 0, 0
    with torch.no_grad():
        for row, example in zip(found.rows, examples(), strict=True):
            text = kind_module("tasks", TEXT.task.kind).target(example, TEXT.task.config)
            assert text.startswith(example.text)
            ids = tokens(text, add_special_tokens=False)["input_ids"]
            ids = (tokens.bos_token_id, *ids)
            assert len(ids) <= 128
            value = float(answer_log_likelihood(model, Encoded(ids, 1)))
            assert (row["logprob"], row["tokens"]) == (pytest.approx(value, rel=1e-4), len(ids) - 1)
            total, count, size = total + value, count + len(ids) - 1, size + len(text.encode())
    values = {score["metric"]: score["value"] for score in found.scores}
    expected = {
        "perplexity": math.exp(-total / count),
        "bits_per_byte": -total / math.log(2) / size,
    }
    assert values == pytest.approx(expected, rel=1e-4)
    for score in found.scores:
        assert score["n"] == COUNT and score["low"] < score["value"] < score["high"]
        assert score["constant"] is None and "gain" not in score


def test_a_text_that_is_too_long_for_the_model_is_scored_in_pieces_and_no_token_is_lost() -> None:
    text = Encoded(tuple(range(100)), 1)
    for longest in (2, 7, 99, 100, 128):
        parts = cut(text, longest)
        assert all(2 <= len(part.ids) <= longest and part.answer_start == 1 for part in parts)
        assert [token for part in parts for token in part.ids[1:]] == list(range(1, 100))
        assert all(one.ids[-1] == other.ids[0] for one, other in pairwise(parts))
    assert cut(Encoded((5,), 1), 8) == [Encoded((5,), 1)]


# --- answers that are generated

NER = reader.task("fin_ner", "short")
SENTENCES = [
    (
        "This Agreement is made by Acme Corp of New York with the Lender .",
        "O O O O O B-ORG I-ORG O B-LOC I-LOC O O B-PER O",
    ),
    ("Nothing is due .", "O O O O"),
    ("The Borrower and the Lender agree .", "O B-PER O O B-PER O O"),
]


def sentences() -> list[Example]:
    return [
        Example(id=f"made/{row}", text=text, label=label)
        for row, (text, label) in enumerate(SENTENCES * 3)
    ]


@torch.no_grad()
def outputs_are_those_of_one_by_one(
    model: nn.Module, name: str, rows: list[Row], longest: int, examples: Sequence[Example]
) -> None:
    """Each row's output is the likeliest continuation of its own prompt, token by token, and its
    prediction what the task reads in it.

    Prompt and answer have `longest` tokens at most, and a prompt half of them: its end.
    """
    tokens: Any = tokenizer(reader.model(name).family)
    module = kind_module("tasks", NER.task.kind)
    for row, example in zip(rows, examples, strict=True):
        ids = tokens(module.prompt(example, NER.task.config))["input_ids"]
        keep, excess = int(ids[0] == tokens.bos_token_id), max(0, len(ids) - longest // 2)
        ids = ids[:keep] + ids[keep + excess :]
        given = len(ids)
        while len(ids) < longest:
            token = int(all_logits(model, ids)[-1].argmax())
            if token == tokens.eos_token_id:
                break
            ids.append(token)
        assert row["output"] == tokens.decode(ids[given:], skip_special_tokens=True)
        assert row["prediction"] == module.parse(row["output"], example, NER.task.config)
        assert (row["id"], row["gold"], row["task"]) == (example.id, example.label, "fin_ner")


@everywhere
def test_a_task_that_is_answered_freely_is_generated_and_parsed(name: str) -> None:
    model, longest = stirred(name).eval(), 96
    found = evaluate(
        model, tokenizer(reader.model(name).family), NER, sentences(), EVALUATION, longest
    )
    outputs_are_those_of_one_by_one(model, name, found.rows, longest, sentences())
    broken(
        outputs_are_those_of_one_by_one,
        model,
        name,
        [*found.rows[1:], found.rows[0]],
        longest,
        sentences(),
    )
    again = score_rows(
        NER, sentences(), [json.loads(json.dumps(row)) for row in found.rows], EVALUATION
    )
    assert json.dumps(again) == json.dumps(found.scores)
    assert by_metric(found.scores)["unparsable_rate"]["n"] == len(sentences())


@everywhere
def test_a_prompt_that_leaves_an_answer_too_little_room_loses_its_beginning(name: str) -> None:
    """The end of a prompt decides: two that differ only in what is cut off get the same answer."""
    model, tokens = stirred(name).eval(), tokenizer(reader.model(name).family)
    tail = (
        " and the rest of a sentence that is long enough to fill the half that a prompt may have"
        * 2
    )
    pair = [
        Example(id=str(row), text=start + tail, label="O")
        for row, start in enumerate(("Acme Corp", "Borrower , Lender"))
    ]
    first, second = evaluate(model, tokens, NER, pair, EVALUATION, 48).rows
    assert first["output"] == second["output"]
    outputs_are_those_of_one_by_one(model, name, [first, second], 48, pair)
    broken(outputs_are_those_of_one_by_one, model, name, [first, second], 60, pair)


def test_the_oracle_of_entities_gains_and_its_constants_are_read_against_the_sentence() -> None:
    module, config = kind_module("tasks", NER.task.kind), NER.task.config
    said = [
        module.parse(module.target(example, config), example, config) for example in sentences()
    ]
    rows = [
        {"task": "fin_ner", "id": example.id, "gold": example.label, "prediction": prediction}
        for example, prediction in zip(sentences(), said, strict=True)
    ]
    score = by_metric(score_rows(NER, sentences(), rows, EVALUATION))["f1_entity"]
    assert score["value"] == 1.0 and score["constant_answer"] == "Borrower, Lender"
    assert score["constant"] == pytest.approx(2 * 3 / (3 + 5)), (
        "three of five entities, and nothing wrong"
    )


@everywhere
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("task", ["tfns", "tfns_text", "fin_ner"])
def test_a_model_that_computes_no_numbers_is_not_scored(
    task: str, number: float, name: str
) -> None:
    """The likeliest of choices that are all NaN would be the first: an accuracy."""
    model = stirred(name).eval()
    block = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[1]
    with torch.no_grad():
        next(block.parameters()).view(-1)[3] = number
    scored = {"tfns": TASK, "tfns_text": TEXT, "fin_ner": NER}[task]
    given = sentences() if task == "fin_ner" else examples()
    family = tokenizer(reader.model(name).family)
    with pytest.raises(NotFinite, match=rf"^{given[0].id}: .* (is|are|or) (nan|-?inf|infinite)\.$"):
        evaluate(model, family, scored, given, EVALUATION, 128)


def test_one_answer_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is, and before anything is scored."""

    def planted(*arguments: Any) -> list[list[float]]:
        values = choice_log_likelihoods(*arguments)
        values[17][2] = -math.inf
        return values

    monkeypatch.setattr("finrepro.evaluation.evaluate.choice_log_likelihoods", planted)
    message = f"^{examples()[17].id}: the log-probability of an answer is -inf\\.$"
    with pytest.raises(NotFinite, match=message):
        evaluated(stirred(MINIATURES[0]), MINIATURES[0])


def test_a_perplexity_that_is_no_number_is_no_score() -> None:
    rows = [
        {"task": "tfns_text", "id": example.id, "logprob": -800.0, "tokens": 1, "bytes": 1}
        for example in examples()
    ]
    with pytest.raises(NotFinite, match=r"^tfns_text: its perplexity is inf\.$"):
        score_rows(TEXT, examples(), rows, EVALUATION)


@everywhere
def test_an_answer_ends_at_each_end_token_that_is_given(name: str) -> None:
    model, tokens = stirred(name).eval(), tokenizer(reader.model(name).family)
    settings = (model, tokens, NER, sentences(), EVALUATION, 128)
    alone = evaluate(*settings).rows
    assert evaluate(*settings, ends=[tokens.eos_token_id]).rows == alone
    text = next(row["output"] for row in alone if row["output"])
    end = tokens(text, add_special_tokens=False)["input_ids"][1]
    ended = evaluate(*settings, ends=[tokens.eos_token_id, end]).rows
    assert ended != alone
    for row, whole in zip(ended, alone, strict=True):
        assert whole["output"].startswith(row["output"])


@pytest.mark.parametrize(
    ("listed", "ends"),
    [
        (None, (0,)),
        ("{}", (0,)),
        ('{"eos_token_id": null}', (0,)),
        ('{"eos_token_id": 7}', (0, 7)),
        ('{"eos_token_id": [2047, 0, 5, 2047]}', (0, 5, 2047)),
    ],
)
def test_the_end_tokens_are_the_tokenizers_and_the_models(
    listed: str | None, ends: tuple[int, ...], tmp_path: Path
) -> None:
    if listed is not None:
        (tmp_path / "generation_config.json").write_text(listed, encoding="utf-8")
    assert end_tokens(tmp_path, tokenizer("gpt2")) == ends
    assert end_tokens(None, tokenizer("gpt2")) == (0,)


@pytest.mark.parametrize(
    "listed", ["[", "[1]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1.5]}']
)
def test_end_tokens_that_are_no_ids_are_refused_in_one_line(listed: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(listed, encoding="utf-8")
    with pytest.raises(EnvironmentFault, match=r"generation_config\.json: [^\n]*$"):
        end_tokens(tmp_path, tokenizer("gpt2"))
