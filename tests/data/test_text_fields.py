"""Law: what is no text is a fault that names dataset, file and line; it is never read as text."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from fixtures.process import one_line

from finrepro.catalogue import reader
from finrepro.data import files as data
from finrepro.errors import EnvironmentFault
from finrepro.kinds import format_of
from finrepro.settings import Choice

UMLAUT = "M\u00fcller".encode("latin-1")
PROMPT = "Instruction: x\nInput: {}\nAnswer: "


def unpinned(name: str) -> Choice:
    """The dataset, whatever its files hold."""
    dataset = reader.dataset(name)
    files = {
        role: dataclasses.replace(file, sha256=None, rows=None)
        for role, file in dataset.config.files.items()
    }
    return dataclasses.replace(dataset, config=dataclasses.replace(dataset.config, files=files))


def refused(name: str, contents: dict[str, bytes], place: str, reason: str) -> None:
    with pytest.raises(EnvironmentFault) as fault:
        format_of(unpinned(name)).read(contents, name)
    message = one_line(fault.value)
    assert message.startswith(f"dataset '{name}', file {place}: ") and reason in message, message


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("value", [None, math.nan, 3, "", " ", "nan", "NaN", ["Up."]])
def test_a_text_that_is_none_is_named_in_json_lines(value: Any):
    good = {"news": "Up.", "label": "neutral"}
    reason = "NaN is no JSON" if value is math.nan else "expected text"
    refused("nwgi", {"train": jsonl(good, good | {"news": value})}, "'train', line 2", reason)
    prompted = {"context": PROMPT.format("Up."), "target": "neutral"}
    for key in ("nwgi", "fiqa_sa"):
        rows = jsonl(prompted, prompted, prompted | {"context": value})
        refused(key, {"test": rows}, "'test', line 3", reason)


@pytest.mark.parametrize("text", ["", " ", "nan"])
def test_a_prompt_without_its_text_is_named(text: str):
    rows = jsonl({"context": PROMPT.format(text), "target": "neutral"})
    for name in ("nwgi", "fiqa_sa"):
        refused(name, {"test": rows}, "'test', line 1", "expected text")


@pytest.mark.parametrize("row", [",1", "  ,1", "nan,1", '"\n ",1'])
def test_a_text_that_is_none_is_named_in_csv(row: str):
    line = 3 + row.count("\n")
    content = f"text,label\nUp.,1\n{row}\n".encode()
    refused("tfns", {"train": content}, f"'train', line {line}", "expected text")


def test_a_row_that_ends_early_is_named():
    refused("tfns", {"train": b"label,text\n1,Up.\n1\n"}, "'train', line 3", "'text' is null")


def test_a_field_that_the_csv_reader_does_not_take_is_named():
    long = "x" * (csv.field_size_limit() + 1)
    content = f"text,label\nUp.,1\n{long},1\n".encode()
    refused("tfns", {"train": content}, "'train', line 3", "field larger than field limit")


@pytest.mark.parametrize("sentence", [None, math.nan, 1, "", "nan"])
def test_a_sentence_that_is_none_is_named(sentence: Any):
    entry = {"sentence": sentence, "info": [{"sentiment_score": "0.5"}]}
    good = entry | {"sentence": "Up."}
    test = jsonl({"context": PROMPT.format("Down."), "target": "negative"})
    headline = json.dumps({"7": good, "8": entry}).encode()
    contents = {"test": test, "headline": headline, "post": json.dumps({"1": good}).encode()}
    with pytest.raises(EnvironmentFault, match=r"^dataset 'fiqa_sa', file 'headline'") as fault:
        format_of(unpinned("fiqa_sa")).read(contents, "fiqa_sa")
    message = one_line(fault.value)
    assert ("entry 8" in message and "expected text" in message) or "NaN is no JSON" in message


def test_a_score_that_is_no_number_has_no_class():
    for score in ("nan", "inf"):
        entry = {"sentence": "Up.", "info": [{"sentiment_score": score}]}
        test = jsonl({"context": PROMPT.format("Down."), "target": "negative"})
        contents = {"test": test, "headline": json.dumps({"7": entry}).encode(), "post": b"{}"}
        refused("fiqa_sa", contents, "'headline'", f"a score is {score}")


def test_a_line_without_a_sentence_is_named():
    content = b"Up.@positive\n@neutral\n"
    refused("fpb", {"all": content}, "'all', line 2", "expected text")


@pytest.mark.parametrize(
    ("name", "role", "content", "found"),
    [
        ("fpb", "all", b"Up.@positive\nDown.@negativ\n", "'negativ'"),
        ("fpb", "all", b"Up.@positive\nDown.", "expected text"),
        (
            "fiqa_sa",
            "test",
            jsonl(*({"context": PROMPT.format("Up."), "target": t} for t in ("neutral", "up"))),
            "'up'",
        ),
        ("nwgi", "train", jsonl(*({"news": "Up.", "label": t} for t in ("neutral", 1))), "1"),
        ("tfns", "train", b"text,label\nUp.,3\n", "'3'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_label_that_no_task_has_is_named(name: str, role: str, content: bytes, found: str):
    refused(name, {role: content}, f"'{role}', line 2", found)


@pytest.mark.parametrize(
    ("name", "role", "lines"),
    [
        ("nwgi", "train", [b'{"news": "Up.", "label": "neutral"}', b'{"news": "' + UMLAUT]),
        ("tfns", "test", [b"text,label", UMLAUT + b",1"]),
        ("fin_ner", "train", [b"Up x x O", UMLAUT + b" x x O"]),
        ("wikitext2", "train", [b"Up.", UMLAUT]),
    ],
)
def test_bytes_of_another_encoding_are_named(name: str, role: str, lines: list[bytes]):
    refused(name, {role: b"\n".join(lines)}, f"'{role}', line 2", "not UTF-8 (byte 0xfc")


def test_a_byte_order_mark_and_blank_lines_at_the_end_are_no_fault():
    content = b"\xef\xbb\xbf" + jsonl({"news": "Up.", "label": "neutral"}) + b"\n\n"
    splits = format_of(unpinned("nwgi")).read({"train": content}, "nwgi")
    assert [example.text for example in splits["train"]] == ["Up."]


@pytest.mark.parametrize("role", ["train", "test"])
def test_a_split_without_rows_is_one_line(role: str, tmp_path: Path):
    dataset = unpinned("tfns")
    for file_role, file in dataset.config.files.items():
        path = tmp_path / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        row = "" if file_role == role else "Up.,1\nDown.,0\n"
        path.write_text(f"text,label\n{row}", encoding="utf-8")
    for splits in (None, (role,)):
        with pytest.raises(EnvironmentFault, match=f"no rows in its {role} split") as fault:
            data.load(dataset, tmp_path, splits)
        assert str(tmp_path / dataset.config.files[role].path) in one_line(fault.value)
    data.load(dataset, tmp_path, ("test" if role == "train" else "train",))
