"""Documents come out of every kind of file whole, in order and with their line; what is damaged
is named and costs only itself.
"""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from fixtures.process import one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from finrepro import bounds
from finrepro.data.preparing.command import prepare_corpus
from finrepro.data.preparing.documents import RULES, split_file
from finrepro.data.preparing.entries import (
    CorpusEntry,
    corpus_entry,
    listed,
    named_or_path,
    sources_of,
)
from finrepro.data.preparing.hub import HubSplit
from finrepro.data.preparing.sources import LocalFiles
from finrepro.errors import EnvironmentFault, UsageError
from finrepro.settings import build

Faults = list[tuple[str, int, str]]


def gather(source: LocalFiles | HubSplit) -> tuple[list[tuple[str, int]], Faults]:
    """[(text, line)] and faults."""
    faults: Faults = []
    documents_read = [
        (document.text, document.line)
        for _, document in source.read(lambda *fault: faults.append(fault))
    ]
    return documents_read, faults


def cut(rule: str, content: bytes) -> tuple[list[tuple[str, int]], Faults]:
    faults: Faults = []
    documents = split_file(rule, io.BytesIO(content), "f", lambda *fault: faults.append(fault))
    return [(document.text, document.line) for document in documents], faults


FIRST = " = Robert Boulter = \n \n An actor . \n \n = = Career = = \n \n He acted . \n \n"
SECOND = " = Du Fu = \n \n x = 3 = y\n"


@pytest.mark.parametrize(
    ("rule", "content", "expected"),
    [
        ("file", b"a\nb\n", [("a\nb\n", 1)]),
        ("lines", b"a\r\n\nb", [("a", 1), ("", 2), ("b", 3)]),
        ("paragraphs", b"\n a\nb\n \n\nc\n", [(" a\nb\n", 2), ("c\n", 6)]),
        ("paragraphs", b"a\n\nb", [("a\n", 1), ("b", 3)]),
        ("articles", f" \n{FIRST}{SECOND}".encode(), [(" \n", 1), (FIRST, 2), (SECOND, 10)]),
        ("articles", b"no heading\n", [("no heading\n", 1)]),
        ("file", b"\xef\xbb\xbfa", [("a", 1)]),
    ],
)
def test_a_rule_cuts_where_it_says(
    rule: str, content: bytes, expected: list[tuple[str, int]]
) -> None:
    assert cut(rule, content) == (expected, [])


TEXT = st.text(st.sampled_from("ab =\n"), max_size=60)


def nothing_is_lost(rule: str, content: str, documents: list[str]) -> None:
    """All of the text, but for line ends and blank lines where these part documents."""
    assert "".join("".join(documents).split()) == "".join(content.split())
    if rule in ("file", "articles"):
        assert "".join(documents) == content


@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_no_rule_loses_text(content: str) -> None:
    for rule in RULES:
        documents = [text for text, _ in cut(rule, content.encode())[0]]
        nothing_is_lost(rule, content, documents)
        lines = content.split("\n")
        for text, line in cut(rule, content.encode())[0]:
            assert lines[line - 1].startswith(text.split("\n")[0])


def test_wikitexts_test_split_has_its_sixty_articles() -> None:
    (source,) = sources_of("wikitext2", None).validation
    assert isinstance(source, LocalFiles)
    documents_read, faults = gather(source)
    articles = [text for text, _ in documents_read if text.strip()]
    assert len(articles) == 60 and not faults
    assert articles[0].startswith(" = Robert Boulter = \n")
    assert "".join(text for text, _ in documents_read).encode() == source.path.read_bytes()


def test_a_damaged_document_is_named_with_its_line_and_the_others_are_read() -> None:
    documents_read, faults = cut("paragraphs", b"a\n\nb\nc\xff\n\nd\n\ne\0f\n")
    assert [text for text, _ in documents_read] == ["a\n", "d\n"]
    assert [(line, reason.split(" (")[0]) for _, line, reason in faults] == [
        (4, "not UTF-8"),
        (8, "binary data"),
    ]


def test_an_unknown_rule_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match="Did you mean 'articles'"):
        LocalFiles(tmp_path / "a.txt", "article")


def parquet(values: list[str | None], name: str = "text") -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({name: values, "other": list(range(len(values)))}), buffer
    )
    return buffer.getvalue()


ROWS = (
    b'{"text": "one"}\n\n{"text": 2}\n{"t": "x"}\n[]\n'
    b'{"text": \n{"text": "\xff"}\n{"text": "two\\nlines"}\n'
)
JSON_FAULTS = [
    (3, "the field 'text' is int, expected text"),
    (4, "no field 'text'; there are t"),
    (5, "expected an object with a field 'text'"),
    (6, "not JSON"),
    (7, "not JSON"),
]


@pytest.mark.parametrize(
    ("name", "content", "expected", "faults"),
    [
        ("a.txt", b"", [], [(0, "the file is empty")]),
        ("a.txt", b"\x7fELF\0\0", [], [(1, "a binary file")]),
        ("a.txt.gz", gzip.compress(b"one", mtime=0), ["one"], []),
        ("a.jsonl", ROWS, ["one", "two\nlines"], JSON_FAULTS),
        ("a.jsonl.gz", gzip.compress(ROWS, mtime=0), ["one", "two\nlines"], JSON_FAULTS),
        (
            "a.jsonl.gz",
            gzip.compress(ROWS * 500, mtime=0)[:200],
            None,
            [(0, "the compressed file is damaged or cut short")],
        ),
        ("a.jsonl.gz", b"plain", [], [(0, "the compressed file is damaged or cut short")]),
        (
            "a.parquet",
            parquet(["one", None, "two"]),
            ["one", "two"],
            [(2, "the field 'text' is NoneType, expected")],
        ),
        (
            "a.parquet",
            parquet(["one"], "body"),
            [],
            [(0, "no column 'text'; there are body, other")],
        ),
        ("a.parquet", parquet(["one"])[:-9], [], [(0, "not a Parquet file that can be read")]),
        ("a.parquet", b"x", [], [(0, "not a Parquet file that can be read")]),
    ],
)
def test_a_file_gives_its_texts_and_names_what_is_damaged(
    name: str,
    content: bytes,
    expected: list[str] | None,
    faults: list[tuple[int, str]],
    tmp_path: Path,
) -> None:
    (tmp_path / name).write_bytes(content)
    documents_read, reported = gather(LocalFiles(tmp_path / name))
    if expected is not None:
        assert [text for text, _ in documents_read] == expected
        assert len(reported) == len(faults)
    for message, (line, reason) in zip(
        reported[-len(faults) :] if faults else [], faults, strict=True
    ):
        assert (
            message[:2] == (name, line) and message[2].startswith(reason) and "\n" not in message[2]
        )


def test_rows_that_are_too_deep_or_too_long_are_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = b'{"text": "x", "a": ' + b"[" * 100 + b"]" * 100 + b"}\n"
    row = b'{"text": "%s"}\n'
    long = b"x" * 300
    (tmp_path / "a.jsonl").write_bytes(deep + row % b"one" + row % long + row % b"last")
    documents, reported = gather(LocalFiles(tmp_path / "a.jsonl"))
    assert [text for text, _ in documents] == ["one", long.decode(), "last"]
    assert reported == [
        ("a.jsonl", 1, "not JSON (nested more than 100 deep, the deepest that is read)")
    ]
    monkeypatch.setattr(bounds, "LINE_BYTES", 310)
    documents, reported = gather(LocalFiles(tmp_path / "a.jsonl"))
    assert [text for text, _ in documents] == ["one"]
    assert reported[1][2].startswith("a line of more than 310 bytes")
    assert reported[1][2].endswith("from there on the file is not read")


def test_a_folder_is_read_in_the_order_of_names_and_goes_on_after_a_damaged_file(
    tmp_path: Path,
) -> None:
    for name, content in {
        "b.jsonl": b'{"body": "third"}\n',
        "a/z.txt": b"first",
        "a.txt": b"second",
        "c.jsonl.gz": b"?",
        "d.jsonl": b'{"body": "last"}',
        "README.md": b"no",
        ".hidden.txt": b"no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source = LocalFiles(tmp_path, field="body")
    documents_read, faults = gather(source)
    assert [text for text, _ in documents_read] == ["first", "second", "third", "last"] and len(
        faults
    ) == 1
    assert list(source.description["files"]) == [
        "a/z.txt",
        "a.txt",
        "b.jsonl",
        "c.jsonl.gz",
        "d.jsonl",
    ]
    assert source.size is None and LocalFiles(tmp_path / "a.txt").size == 6
    assert str(tmp_path) not in json.dumps(source.description), (
        "the index is the same wherever the files lie"
    )


def test_where_there_is_nothing_to_read_it_is_said(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none", "no such file or folder"),
        (tmp_path, "holds no file of a known kind"),
    ):
        with pytest.raises(EnvironmentFault, match=message):
            LocalFiles(path)


# The hub: its library streams files of this machine by the same code.


@pytest.mark.parametrize("suffix", [".json", ".csv", ".tsv", ".html", ".json.gz", ".CSV"])
def test_a_structured_file_is_not_read_as_text(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b'{"text": "a"}')
    kind = suffix.removesuffix(".gz").lower()
    with pytest.raises(EnvironmentFault, match=rf"rows\S+: a \{kind} file is not read: write"):
        LocalFiles(path)


def test_a_field_of_plain_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match=r"--field goes with .*; a\.txt would be read as plain"):
        prepare_corpus(str(tmp_path / "a.txt"), tmp_path, tmp_path / "out", field="body")


def test_a_dataset_is_streamed_row_by_row(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": None}, {"text": "two"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents_read, faults = gather(HubSplit(str(tmp_path), None, "train"))
    assert documents_read == [("one", 1), ("two", 3)]
    assert [(line, reason) for _, line, reason in faults] == [
        (2, "the field 'text' is NoneType, expected text")
    ]
    assert (
        gather(HubSplit(str(tmp_path), None, "train", "body"))[1][0][2]
        == "no field 'body'; there are text"
    )


def test_a_hub_that_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it with hf_secret\nTraceback")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(EnvironmentFault) as caught:
        gather(HubSplit("owner/name", "abc", "train"))
    assert one_line(caught.value) == (
        "could not read hf://datasets/owner/name@abc, split train: Couldn't reach it with [token]"
    )

    def cut_off(*_: object, **__: object) -> object:
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", cut_off)
    with pytest.raises(EnvironmentFault, match=r"row 2: reset by peer; run the same command again"):
        gather(HubSplit("owner/name", "abc", "train"))


# The catalogue.


def test_every_entry_is_checked_and_listed() -> None:
    assert {"wikitext2", "tinyshakespeare", "openwebtext"} <= {
        line.split(":")[0] for line in listed()
    }
    documents_read = sources_of("openwebtext", None).train[0]
    assert (
        isinstance(documents_read, HubSplit)
        and documents_read.revision == "f3808c30e817981b845ec549c43e82bb467d8144"
    )
    assert corpus_entry("openwebtext").held_out is not None


def test_a_corpus_that_is_not_here_or_not_the_recorded_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        EnvironmentFault, match=r"'tinyshakespeare' is not here: put text/tinyshakespeare.txt under"
    ):
        sources_of("tinyshakespeare", tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/tinyshakespeare.txt").write_text("another text")
    with pytest.raises(EnvironmentFault, match="sha256 is"):
        sources_of("tinyshakespeare", tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'wikitext2'"):
        named_or_path("wikitext", None)


GOOD = {
    "title": "t",
    "licence": "l",
    "embedded": False,
    "documents": "lines",
    "held_out": None,
    "files": {
        name: {"path": "x", "sha256": None, "rows": None} for name in ("train", "validation")
    },
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("files"), "needs either 'files' or 'hub'"),
        (lambda e: e.update(documents="line"), "'documents' must be one of"),
        (lambda e: e["files"].pop("train"), "'files' are 'train'"),
        (lambda e: e.update(held_out={"fraction": 0.1, "seed": 0}), "either a file or 'held_out'"),
        (lambda e: e.update(held_out={"fraction": 1.5, "seed": 0}), "held_out"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(
    change: Callable[[dict[str, object]], object], message: str
) -> None:
    assert build(CorpusEntry, GOOD, "corpora.x")
    entry = json.loads(json.dumps(GOOD))
    change(entry)
    with pytest.raises(UsageError, match=message):
        build(CorpusEntry, entry, "corpora.x")
