"""Law: running text is its paragraphs, no heading among them, and nothing of it is lost."""

import pytest

from finrepro.catalogue import reader
from finrepro.data.formats.paragraphs import Config, read
from finrepro.errors import EnvironmentFault

DATASET = reader.dataset("wikitext2")
TEXT = """
 = Nero =

 A paragraph = with signs = inside .

 = = Reign = =
 Another one .
 = = = 54 – 59 = = =

 = Manila ( city ) =
 The last .
"""


def config(articles: int | None = None, **files: int | None) -> Config:
    files_of_splits = {
        name: {"path": name, "sha256": None, "rows": rows} for name, rows in files.items()
    }
    raw = reader.entry("datasets", "wikitext2", "dataset")
    choice = reader.choose(
        "datasets", "text", raw | {"files": files_of_splits, "articles": {"test": articles}}, "text"
    )
    return choice.config


def test_paragraphs_stand_in_order_with_their_article():
    examples = read({"test": TEXT.encode()}, "text", config(test=3))["test"]
    assert [example.text for example in examples] == [
        "A paragraph = with signs = inside .",
        "Another one .",
        "The last .",
    ]
    assert [example.source for example in examples] == ["Nero", "Nero", "Manila ( city )"]
    assert [example.id for example in examples] == [f"text/test/{row}" for row in range(3)]


def test_only_the_first_articles_are_taken_where_it_is_said_how_many():
    examples = read({"test": TEXT.encode()}, "text", config(articles=1, test=3))["test"]
    assert [example.source for example in examples] == ["Nero", "Nero"]


def test_a_file_without_its_headings_has_no_articles():
    examples = read({"train": TEXT.encode()}, "text", config(train=3))["train"]
    assert [example.source for example in examples] == [""] * 3


def test_another_number_of_paragraphs_is_refused():
    with pytest.raises(EnvironmentFault, match="3 rows, expected 4"):
        read({"test": TEXT.encode()}, "text", config(test=4))


def test_what_is_no_text_is_refused_in_one_line():
    with pytest.raises(EnvironmentFault, match="line 1: not UTF-8"):
        read({"test": b"abc\xff\xfe"}, "text", config(test=None))
