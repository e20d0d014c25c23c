"""Law: a task's scorer is a function of the answers - 1.0 for the right ones, the printed
constant for one label, nothing for no answer.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.process import python

from finrepro.catalogue import reader
from finrepro.catalogue.spec import TaskSpec
from finrepro.data import files
from finrepro.data.examples import Example, Splits
from finrepro.errors import UsageError
from finrepro.kinds import choose, kind_module

RAW = reader.entries("tasks")
CLASSIFICATION = tuple(name for name in RAW if RAW[name]["kind"] == "classification")
PROMPTS = [(name, template) for name in CLASSIFICATION for template in RAW[name]["templates"]]
# Constant-answer baselines of the published test sets, counted from the files: accuracy, weighted
# F1, macro F1.
CONSTANTS = {
    "tfns": ("neutral", 2388, 0.656, 0.519, 0.264),
    "fpb": ("neutral", 1212, 0.602, 0.452, 0.250),
    "fiqa_sa": ("positive", 235, 0.600, 0.450, 0.250),
    "nwgi_7": ("moderately positive", 4047, 0.376, 0.206, 0.078),
    "nwgi_3": ("neutral", 4047, 0.413, 0.241, 0.195),
    "nwgi_polar": ("positive", 4047, 0.547, 0.387, 0.236),
}
QUALITY = ("accuracy", "f1_weighted", "f1_macro", "mcc")


def resolved(name: str) -> TaskSpec:
    return reader.task(name, next(iter(RAW[name]["templates"])))


@cache
def splits(name: str, folder: Path | None) -> Splits:
    """Every split, or the test set alone where no file of the training split is to be had."""
    dataset = resolved(name).dataset
    return files.load(
        dataset,
        folder,
        None if files.dataset_missing_reason(dataset, folder) is None else ("test",),
    ).splits


def all_splits(name: str, request: pytest.FixtureRequest) -> Splits:
    embedded = resolved(name).dataset.config.embedded
    return splits(name, None if embedded else request.getfixturevalue("data_dir"))


def held_out(name: str, request: pytest.FixtureRequest) -> tuple[Example, ...]:
    """The test set."""
    return all_splits(name, request)["test"]


def scored(name: str, examples: tuple[Example, ...], outputs: list[str]) -> dict[str, float]:
    """The scores of raw outputs: parsed, tallied, summed."""
    spec = resolved(name)
    task, config = kind_module("tasks", spec.task.kind), spec.task.config
    rows = [
        {"gold": example.label, "prediction": task.parse(output, example, config)}
        for example, output in zip(examples, outputs, strict=True)
    ]
    return {
        key: float(value)
        for key, value in task.score(task.tally(rows, config).sum(0), config).items()
    }


def test_there_are_classification_tasks_and_each_has_a_known_constant():
    assert CLASSIFICATION and set(CLASSIFICATION) == set(CONSTANTS)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_the_right_answers_score_one(name: str, request: pytest.FixtureRequest):
    spec, examples = resolved(name), held_out(name, request)
    task, config = kind_module("tasks", spec.task.kind), spec.task.config
    scores = scored(name, examples, [task.target(example, config) for example in examples])
    assert {metric: scores[metric] for metric in QUALITY} == pytest.approx(
        dict.fromkeys(QUALITY, 1.0)
    )
    assert scores["unparsable_rate"] == 0


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_one_right_answer_made_wrong_scores_less(name: str, request: pytest.FixtureRequest):
    """The planted mutant of the law above."""
    spec, examples = resolved(name), held_out(name, request)
    task, config = kind_module("tasks", spec.task.kind), spec.task.config
    outputs = [task.target(example, config) for example in examples]
    outputs[-1] = next(label for label in config.labels if label != outputs[-1].strip())
    scores = scored(name, examples, outputs)
    assert all(scores[metric] < 1 for metric in QUALITY)
    assert scores["accuracy"] == pytest.approx(1 - 1 / len(examples))


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_the_best_constant_answer_scores_what_is_printed_beside_every_result(
    name: str, request: pytest.FixtureRequest
):
    spec, examples = resolved(name), held_out(name, request)
    answers = kind_module("tasks", spec.task.kind).constant_answers(spec.task.config)
    best_label, rows, *expected = CONSTANTS[name]
    scores = {answer: scored(name, examples, [answer] * len(examples)) for answer in answers}
    best = max(scores, key=lambda answer: scores[answer]["accuracy"])
    assert (best, len(examples)) == (best_label, rows)
    assert [
        scores[best][metric] for metric in ("accuracy", "f1_weighted", "f1_macro")
    ] == pytest.approx(expected, abs=6e-4)
    assert scores[best]["mcc"] == 0


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize("output", ["", " ", "\n", "the sentiment is hard to tell"])
def test_silence_and_rambling_score_nothing_and_are_counted(
    name: str, output: str, request: pytest.FixtureRequest
):
    examples = held_out(name, request)
    scores = scored(name, examples, [output] * len(examples))
    assert scores == {**dict.fromkeys(QUALITY, 0.0), "unparsable_rate": 1.0}


@pytest.mark.parametrize(("name", "template"), PROMPTS)
def test_a_repeated_prompt_scores_nothing(name: str, template: str, request: pytest.FixtureRequest):
    examples = held_out(name, request)
    spec = reader.task(name, template)
    task, config = kind_module("tasks", spec.task.kind), spec.task.config
    prompts = [task.prompt(example, config) for example in examples]
    echoes = [
        prompts,
        [prompt + " " for prompt in prompts],
        [prompt + prompt for prompt in prompts],
    ]
    for outputs in echoes:
        assert scored(name, examples, outputs)["unparsable_rate"] == 1.0


@pytest.mark.parametrize(("name", "template"), PROMPTS)
def test_a_template_ends_without_a_space_and_the_answer_brings_it(name: str, template: str):
    spec = reader.task(name, template)
    task, config = kind_module("tasks", spec.task.kind), spec.task.config
    label = next(
        (given for given, meant in config.label_map.items() if meant == config.labels[0]),
        config.labels[0],
    )
    example = Example(
        id="x", text="Sales rose {source} {not/a/field} \\n 3 %", label=label, source="tweet"
    )
    prompt = task.prompt(example, config)
    assert prompt == prompt.rstrip() and example.text in prompt and "{text}" not in prompt
    assert "{source}" not in prompt.replace(example.text, "")
    assert task.target(example, config) == " " + config.labels[0]
    assert task.choices(example, config) == tuple(" " + label for label in config.labels)
    assert task.target(example, config) in task.choices(example, config)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_every_label_of_the_data_is_a_label_of_the_task(name: str, request: pytest.FixtureRequest):
    spec = resolved(name)
    task, config = kind_module("tasks", spec.task.kind), spec.task.config
    for rows in all_splits(name, request).values():
        assert {task.target(example, config).strip() for example in rows} == set(config.labels)
        if config.label_map:
            assert {example.label for example in rows} == set(config.label_map), (
                "the map names every label once"
            )


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("positive", "positive"),
        (" Positive.", "positive"),
        ("NEUTRAL", "neutral"),
        ("\n\nnegative", "negative"),
        ("'negative'", "negative"),
        ("**positive**", "positive"),
        ("neutral!\nInstruction: What is the sentiment of this tweet?", "neutral"),
        ("positive\nnegative", "positive"),  # the first line counts
        ("", None),
        ("   \n \n", None),
        ("positively", None),
        ("not positive", None),
        ("non-positive", None),
        ("neither positive nor negative", None),
        ("positive negative", None),
        ("positive positive", None),
        ("negative/neutral/positive", None),
        ("{negative/neutral/positive}", None),
        ("The sentiment is positive.", None),
        ("Sentiment: positive", None),
        ("positive sentiment", None),
        ("pos", None),
        ("posi tive", None),
        ("1", None),
        ("\x00", None),
        ("😀", None),
        ("a" * 100_000, None),
    ],
)
def test_an_output_names_one_label_on_its_first_line_or_none(output: str, answer: str | None):
    spec = resolved("tfns")
    example = Example(id="x", text="positive", label="neutral")
    assert kind_module("tasks", spec.task.kind).parse(output, example, spec.task.config) == answer


@pytest.mark.parametrize("name", ["tfns", "nwgi_3"])
def test_a_gold_label_that_the_task_does_not_know_is_an_error_and_not_a_wrong_answer(name: str):
    spec = resolved(name)
    with pytest.raises(KeyError):
        kind_module("tasks", spec.task.kind).tally(
            [{"gold": "bullish", "prediction": "positive"}], spec.task.config
        )


SCRIPT = """
import json, os, sys
from pathlib import Path
from finrepro.catalogue import reader as catalogue; from finrepro.data import files as data
from finrepro.kinds import kind_module
folder = os.environ.get("DATA")
raw, found, loaded = catalogue.entries("tasks"), {}, {}
for name in (name for name in raw if "templates" in raw[name]):
    for number, template in enumerate(raw[name]["templates"]):
        spec = catalogue.task(name, template)
        if data.dataset_missing_reason(spec.dataset, Path(folder) if folder else None, ("test",)):
            continue
        task, config = kind_module("tasks", spec.task.kind), spec.task.config
        if spec.dataset.name not in loaded:
            place = Path(folder) if folder else None
            splits = data.load(spec.dataset, place, ("test",)).splits
            loaded[spec.dataset.name] = splits["test"]
        examples = loaded[spec.dataset.name]
        probes = {
            "oracle": [task.parse(task.target(e, config), e, config) for e in examples],
            "empty": [task.parse("", e, config) for e in examples],
            "echo": [task.parse(task.prompt(e, config), e, config) for e in examples],
        }
        for answer in task.constant_answers(config) if number == 0 else ():
            probes[f"always {answer}"] = [task.constant(answer, e, config) for e in examples]
        for probe, predictions in probes.items():
            rows = [{"gold": e.label, "prediction": p} for e, p in zip(examples, predictions)]
            scores = task.score(task.tally(rows, config).sum(0), config)
            values = {key: float(value) for key, value in scores.items()}
            found[f"{name} {template} {probe}"] = values
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_scores_are_the_same_for_every_hash_seed():
    folder = (
        {"DATA": os.environ["FINREPRO_DATA_DIR"]} if os.environ.get("FINREPRO_DATA_DIR") else {}
    )
    with ThreadPoolExecutor(2) as pool:
        runs = list(
            pool.map(
                lambda seed: python("-c", SCRIPT, PYTHONHASHSEED=seed, **folder),
                ["0", "1", "2", "3"],
            )
        )
    assert [run.stderr for run in runs] == [""] * 4
    assert len({run.stdout for run in runs}) == 1, "the scorer is not a function of the answers"
    scores: dict[str, dict[str, float]] = json.loads(runs[0].stdout)
    assert {"tfns", "fin_ner"} <= {key.split()[0] for key in scores}
    for key, values in scores.items():
        main = next(iter(values))  # the metric of the tables
        if key.endswith("oracle"):
            assert values["unparsable_rate"] == 0.0
            assert all(
                value == pytest.approx(1.0)
                for metric, value in values.items()
                if metric != "unparsable_rate"
            )
        if key.endswith("empty"):
            assert values["unparsable_rate"] == 1.0
        if key.endswith(("empty", "echo")):
            assert values[main] == 0.0
        if " always " in key:
            assert 0 <= values[main] < 1


def test_a_label_map_that_leads_nowhere_is_one_line():
    entry = RAW["nwgi_3"] | {"label_map": {"neutral": "netural"}}
    with pytest.raises(
        UsageError,
        match=r"tasks\.x.*label_map leads to netural; labels are negative, neutral, positive",
    ):
        choose("tasks", "x", entry, "tasks.x")


def test_a_table_names_a_template_or_is_told_which_there_are():
    with pytest.raises(UsageError, match=r"unknown template ''.*fingpt, short"):
        reader.task("tfns")


@pytest.mark.parametrize("name", [name for name in RAW if RAW[name]["kind"] == "language_modeling"])
def test_perplexity_is_that_of_the_tokens_and_not_the_mean_of_texts(name: str):
    spec = reader.task(name)
    task, config = kind_module("tasks", spec.task.kind), spec.task.config
    rows: list[dict[str, Any]] = [
        {"logprob": -3 * np.log(8), "tokens": 3, "bytes": 10},
        {"logprob": -9 * np.log(2), "tokens": 9, "bytes": 8},
    ]
    scores = task.score(task.tally(rows, config).sum(0), config)
    assert scores["perplexity"] == pytest.approx(2 ** ((3 * 3 + 9) / 12))
    assert scores["bits_per_byte"] == pytest.approx((3 * 3 + 9) / 18)
    uniform = task.tally([{"logprob": -np.log(100), "tokens": 1, "bytes": 1}] * 5, config).sum(0)
    assert task.score(uniform, config)["perplexity"] == pytest.approx(100)


def test_the_paragraphs_of_an_article_are_one_cluster():
    task = kind_module("tasks", reader.task("wikitext2_text").task.kind)
    one, two = (Example(id=text, text=text, label="", source="Nero") for text in ("a", "b"))
    assert (
        task.cluster(one)
        == task.cluster(two)
        != task.cluster(Example(id="c", text="a", label="", source="Manila"))
    )


@pytest.mark.parametrize("name", RAW)
def test_equal_texts_are_one_cluster(name: str):
    template = next(iter(RAW[name].get("templates", {"": ""})))
    task = kind_module("tasks", reader.task(name, template).task.kind)
    one, two = Example(id="1", text="a", label="x"), Example(id="2", text="a", label="y")
    assert (
        task.cluster(one) == task.cluster(two) != task.cluster(Example(id="3", text="b", label="x"))
    )


def test_the_embedded_tasks_need_no_folder():
    assert Path(files.EMBEDDED).is_dir()
    assert files.dataset_missing_reason(resolved("tfns").dataset, None) is None
