"""Law: FiQA and NWGI are read as published, with the scores' classes, the test rows in order,
and no test sentence in training.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fixtures.process import one_line

from finrepro.catalogue import reader
from finrepro.data import files as data
from finrepro.data.examples import Example
from finrepro.data.formats import fiqa
from finrepro.data.formats.jsonl_labels import split_prompt
from finrepro.errors import EnvironmentFault
from finrepro.kinds import format_of, kind_module
from finrepro.settings import Choice

FIQA, NWGI = reader.dataset("fiqa_sa"), reader.dataset("nwgi")


def contents(dataset: Choice, folder: Path, splits: tuple[str, ...]) -> dict[str, bytes]:
    locations = data.locate(dataset, folder, splits)
    assert locations is not None
    return {role: path.read_bytes() for role, (_, path) in locations.items()}


def every_row(folder: Path) -> list[Example]:
    """Every scored target of the challenge's files."""
    read = contents(FIQA, folder, ("train",))
    return [
        row
        for role in fiqa.SCORED
        for row in fiqa.scored_rows(read[role], "fiqa_sa", role, FIQA.config)
    ]


def test_fiqa_has_the_counts_of_the_challenge(data_dir: Path):
    rows = every_row(data_dir)
    assert Counter(row.id.split("/")[1] for row in rows) == {"headline": 498, "post": 675}
    assert Counter(row.label for row in rows) == {"positive": 719, "negative": 363, "neutral": 91}
    classes: dict[str, set[str]] = {}
    for row in rows:
        classes.setdefault(row.id.rpartition("/")[0], set()).add(row.label)
    assert len(classes) == 1111 and sum(len(labels) > 1 for labels in classes.values()) == 11


@pytest.mark.parametrize(
    ("score", "label"),
    [
        (-1.0, "negative"),
        (-0.1001, "negative"),
        (-0.1, "neutral"),
        (0.0, "neutral"),
        (0.0999, "neutral"),
        (0.1, "positive"),
    ],
)
def test_a_score_on_the_border_has_the_class_that_fingpt_and_pixiu_give_it(
    score: float, label: str
):
    assert fiqa.sentiment(score, FIQA.config) == label


def test_the_test_set_is_flares_in_order_and_its_rows_are_the_challenges(data_dir: Path):
    test = data.load(FIQA, data_dir, ("test",)).splits["test"]
    path = (
        data_dir / "pixiu_fit" / "fiqasa_test.jsonl"
    )  # PIXIU's own file: each row with ten instructions
    reference = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][::10]
    texts = [row["text"].removeprefix("Text: ").strip() for row in reference]
    assert [(e.text, e.label) for e in test] == [
        (t, row["label"].lower()) for t, row in zip(texts, reference, strict=True)
    ]
    our_rows = {(row.text, row.label, row.source) for row in every_row(data_dir)}
    assert all((e.text, e.label, e.source) in our_rows for e in test), (
        "label and source agree with the scores"
    )
    assert Counter(e.source for e in test) == {"tweet": 128, "news": 107}


def test_no_sentence_of_the_test_set_is_trained_on_which_pixius_split_does(data_dir: Path):
    splits = data.load(FIQA, data_dir).splits
    held_out = {e.text for e in splits["test"]}
    assert not held_out & {e.text for name in ("train", "development") for e in splits[name]}
    assert sum(len(splits[name]) for name in ("train", "development")) == 915
    reference = set()
    for name in ("train", "valid"):
        lines = (
            (data_dir / "pixiu_fit" / f"fiqasa_{name}.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )
        prompts = [json.loads(line)["conversations"][0]["value"] for line in lines]
        reference |= {
            prompt.partition("\nText: ")[2].rpartition("\nAnswer:")[0].strip() for prompt in prompts
        }
    assert sum(e.text in reference for e in splits["test"]) == 22


def test_fiqas_test_set_needs_no_other_file(data_dir: Path):
    assert data.roles(FIQA, ("test",)) == ("test",)
    assert set(data.roles(FIQA, ("development",))) == {"headline", "post", "test"}
    only = format_of(FIQA).read(contents(FIQA, data_dir, ("test",)), "fiqa_sa")
    assert set(only) == {"test"} and len(only["test"]) == 235


def test_nwgis_test_set_is_finloras_with_the_text_out_of_the_prompt(data_dir: Path):
    test = data.load(NWGI, data_dir, ("test",)).splits["test"]
    assert Counter(e.label for e in test) == {
        "moderately positive": 1522,
        "moderately negative": 733,
        "mildly positive": 646,
        "mildly negative": 534,
        "neutral": 491,
        "strong negative": 75,
        "strong positive": 46,
    }
    path = data_dir / NWGI.config.files["test"].path
    prompts = [
        json.loads(line)["context"] for line in path.read_text(encoding="utf-8").splitlines()
    ]
    spec = reader.task("nwgi_7", "fingpt")
    task = kind_module("tasks", spec.task.kind)
    ours = [task.prompt(e, spec.task.config) for e in test]
    assert [" ".join(p.split()) for p in ours] == [" ".join(p.split()) for p in prompts], (
        "and back in"
    )


def test_a_prompt_is_taken_apart_at_its_own_marks():
    assert split_prompt("Instruction: i\nInput: a\nAnswer: b\nInput: c\nAnswer: ") == (
        "Instruction: i",
        "a\nAnswer: b\nInput: c",
    )


def with_rows(dataset: Choice, **rows: int) -> Choice:
    files = {
        role: dataclasses.replace(file, rows=rows.get(role))
        for role, file in dataset.config.files.items()
    }
    return dataclasses.replace(dataset, config=dataclasses.replace(dataset.config, files=files))


GOOD = {"news": "Up.", "label": "neutral"}


@pytest.mark.parametrize(
    "line", ["", "[1]", "{", '"x"', {"news": "Up."}, {"label": "neutral"}, GOOD | {"label": "good"}]
)
def test_a_line_of_another_form_is_named(line: Any):
    lines = [
        json.dumps(GOOD),
        line if isinstance(line, str) else json.dumps(line),
        json.dumps(GOOD),
    ]
    with pytest.raises(EnvironmentFault, match="line 2") as refused:
        format_of(NWGI).read({"train": "\n".join(lines).encode()}, "nwgi")
    assert "nwgi" in one_line(refused.value)


def test_the_training_file_as_the_hubs_library_gives_it_is_read():
    lines = "".join(
        json.dumps({**GOOD, "reason": "it says so", "date": "x"}) + "\n" for _ in range(3)
    )
    splits = format_of(NWGI).read({"train": lines.encode()}, "nwgi")
    assert splits["train"][2] == Example(id="nwgi/train/2", text="Up.", label="neutral")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[1]", b'{"1": {}}', b'{"1": {"sentence": "x", "info": [{}]}}', b'{"1": 2}'],
)
def test_a_file_of_fiqa_in_another_form_is_named(content: bytes, data_dir: Path):
    good = contents(FIQA, data_dir, ("train",))
    with pytest.raises(EnvironmentFault, match="post") as refused:
        kind_module("datasets", with_rows(FIQA, post=1).kind).read(
            {**good, "post": content}, "fiqa_sa", with_rows(FIQA, post=1).config
        )
    assert "fiqa_sa" in one_line(refused.value)
