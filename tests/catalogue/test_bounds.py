"""Law: what is too large or too deep is refused by its bound before a parser reads it."""

import io
import json
import zipfile
from pathlib import Path

import pytest
from fixtures.process import one_line

from finrepro import PROJECT, bounds
from finrepro.bounds import DEPTH, TooLarge
from finrepro.data.files import content_of
from finrepro.data.tokenizer_files import check_bounds
from finrepro.errors import EnvironmentFault, UsageError
from finrepro.settings import read_yaml

DEEP = {
    "flow": lambda depth: "a: " + "[" * (depth - 1) + "]" * (depth - 1),
    "dashes": lambda depth: "a:\n " + "- " * (depth - 1) + "x",
    "columns": lambda depth: "\n".join(" " * level + "a:" for level in range(depth)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_yaml_may_be_as_deep_as_the_bound_and_no_deeper(kind: str, tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text(DEEP[kind](DEPTH))
    assert read_yaml(path)
    path.write_text(DEEP[kind](DEPTH + 1))
    with pytest.raises(UsageError, match=f"more than {DEPTH} deep") as refused:
        read_yaml(path)
    assert str(path) in one_line(refused.value)


def test_yaml_has_a_size_also_with_its_aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.yaml"
    monkeypatch.setattr(bounds, "NODES", 1000)
    rows = ["a0: &a0 [x, x, x, x]"]
    rows += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 4)}]" for level in (1, 2)]
    path.write_text("\n".join(rows))
    assert read_yaml(path)
    rows.append(f"a3: [{', '.join(['*a2'] * 12)}]")
    path.write_text("\n".join(rows))
    with pytest.raises(UsageError, match="1,000 values with its aliases"):
        read_yaml(path)
    monkeypatch.setattr(bounds, "SETTINGS_BYTES", 10)
    with pytest.raises(UsageError, match="the largest that is read"):
        read_yaml(path)


def test_json_has_a_size_and_a_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.json"
    value = {"text": '"[[[' * DEPTH, "list": json.loads("[" * (DEPTH - 1) + "]" * (DEPTH - 1))}
    path.write_text(json.dumps(value))
    assert bounds.read_json(path) == value
    path.write_text("[" * (DEPTH + 1) + "]" * (DEPTH + 1))
    with pytest.raises(TooLarge, match=f"more than {DEPTH} deep"):
        bounds.read_json(path)
    with pytest.raises(TooLarge, match="the largest"):
        bounds.read_text(path, DEPTH)


def test_json_in_bytes_and_its_lines_have_bounds_too(monkeypatch: pytest.MonkeyPatch):
    assert bounds.loads(b'\xef\xbb\xbf{"a": "\xc3\xbc"}') == {"a": "ü"}
    deep = "[" * (DEPTH + 1) + "]" * (DEPTH + 1)
    for text in (deep, deep.encode(), f'{{"a\\\\": {deep}}}', f'["a\\"[", {deep}]'):
        with pytest.raises(TooLarge, match=f"more than {DEPTH} deep"):
            bounds.loads(text)
    monkeypatch.setattr(bounds, "LINE_BYTES", 3)
    assert list(bounds.lines(io.BytesIO(b"ab\n\nabc"))) == [b"ab\n", b"\n", b"abc"]
    with pytest.raises(TooLarge, match="a line of more than 3 bytes"):
        list(bounds.lines(io.BytesIO(b"a\nabcd")))
    monkeypatch.setattr(bounds, "JSON_BYTES", 4)
    assert bounds.loads("[12]") == [12]
    with pytest.raises(TooLarge, match="more than 4 bytes"):
        bounds.loads("[123]")


def test_what_libraries_read_of_a_tokenizer_has_bounds(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    check_bounds(tmp_path)
    deep = "[" * (DEPTH + 1) + "]" * (DEPTH + 1)
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "config.json"):
        (tmp_path / name).write_text(deep)
        with pytest.raises(EnvironmentFault, match=f"{name}: nested more than") as refused:
            check_bounds(tmp_path)
        one_line(refused.value)
        (tmp_path / name).unlink()


def test_a_data_file_has_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"12345")
    assert content_of(path) == b"12345"
    monkeypatch.setattr(bounds, "MEMBER_BYTES", 4)
    with pytest.raises(EnvironmentFault, match=r"rows\.csv: more than 4 bytes") as refused:
        content_of(path)
    one_line(refused.value)


def test_a_member_of_an_archive_has_a_size(monkeypatch: pytest.MonkeyPatch):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a", bytes(2000))
    with zipfile.ZipFile(content) as archive:
        assert bounds.unpack(archive, "a") == bytes(2000)
        monkeypatch.setattr(bounds, "MEMBER_BYTES", 1999)
        with pytest.raises(TooLarge, match="a: more than"):
            bounds.unpack(archive, "a")


def test_every_configuration_is_within_the_bounds():
    for path in (PROJECT / "configs").rglob("*.yaml"):
        assert read_yaml(path), path
