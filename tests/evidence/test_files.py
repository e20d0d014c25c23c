"""Law: a write ends whole or leaves what was there, and nothing beside it."""

import errno
import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.process import one_line

from finrepro.errors import DiskFull, EnvironmentFault, StoreGone, UsageError
from finrepro.evidence.files import (
    disk_errors,
    new_folder,
    read_lines,
    write_bytes,
    write_json,
    write_lines,
)


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_has_the_old_content_or_the_new(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a"
    write_bytes(path, b"old", durable=durable)
    write_bytes(path, b"new", durable=durable)
    assert path.read_bytes() == b"new"

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="full"):
        write_bytes(path, b"newer", durable=durable)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a", b"new")]


def test_only_a_durable_write_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_json(tmp_path / "a.json", {"ü": 1})
    assert synced == []
    write_json(tmp_path / "a.json", {"ü": 1}, indent=1, durable=True)
    assert len(synced) == 2, "the file, and the folder that holds its name"
    assert (tmp_path / "a.json").read_bytes() == '{\n "ü": 1\n}\n'.encode()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": 1}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_not_written(number: float, tmp_path: Path):
    for write, value in ((write_json, {"a": [number]}), (write_lines, [{}, {"a": number}])):
        with pytest.raises(ValueError, match="JSON"):
            write(tmp_path / "a", value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_a_number_that_is_none_is_not_read(constant: str, tmp_path: Path):
    (tmp_path / "a").write_text(f'{{"a": 1.5}}\n{{"a": {constant}}}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=f"{constant} is no JSON"):
        read_lines(tmp_path / "a")


def test_a_folder_comes_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "folder"
    with new_folder(target) as folder:
        (folder / "first").touch()
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "second").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "first"]
    with new_folder(target) as folder:
        (folder / "third").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "third"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line_that_says_what_is_kept(number: int, tmp_path: Path):
    with (
        pytest.raises(EnvironmentFault, match=r"no space left.*; whole shards are kept") as refused,
        disk_errors(tmp_path, "whole shards are kept"),
    ):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in one_line(refused.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT"),
        OSError("I/O error: Disk quota exceeded (os error 122)"),
        Exception("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_or_quota_is_known_by_the_words_of_those_who_wrap_it(
    error: Exception, tmp_path: Path
):
    with pytest.raises(DiskFull, match="no space left") as refused, disk_errors(tmp_path):
        raise error
    one_line(refused.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("(sqlite3.OperationalError) disk I/O error\n[SQL: INSERT INTO runs"),
        OSError(errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_a_write_that_failed_for_a_quota_or_a_failing_disk_is_one_line(
    error: Exception, tmp_path: Path
):
    """It may be the one or the other: SQLite says no more."""
    with (
        pytest.raises(EnvironmentFault, match="its quota is used up") as refused,
        disk_errors(tmp_path, "whole shards are kept"),
    ):
        raise error
    assert not isinstance(refused.value, DiskFull) and refused.value.exit_code == 3
    assert "whole shards are kept" in one_line(refused.value)


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST]
)
def test_a_place_that_cannot_be_written_is_one_line_with_the_option(number: int, tmp_path: Path):
    with (
        pytest.raises(
            EnvironmentFault, match=r"not writable.*choose another with --out"
        ) as refused,
        disk_errors(tmp_path, option="--out"),
    ):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number) in one_line(refused.value)


@pytest.mark.parametrize("error", [UsageError("database or disk is full"), ValueError("x")])
def test_other_errors_pass(error: Exception, tmp_path: Path):
    with pytest.raises(type(error)) as raised, disk_errors(tmp_path):
        raise error
    assert raised.value is error


def by_torch(path: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(200_000)}, path)


def by_safetensors(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(200_000)}, path)


def by_numpy(path: Path) -> None:
    import numpy as np

    np.save(path, np.zeros(200_000))


def by_tokenizers(path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {f"word{number}": number for number in range(20_000)}
    Tokenizer(models.WordLevel(words, "word0")).save(str(path))


def by_python(path: Path) -> None:
    write_bytes(path, bytes(500_000))


@pytest.mark.parametrize(
    "write",
    [by_torch, by_safetensors, by_numpy, by_tokenizers, by_python],
    ids=lambda f: f.__name__,
)
def test_a_disk_that_is_full_is_known_whoever_writes(write: Callable[[Path], None], tmp_path: Path):
    """A limit on the size of files stands for the full disk: writers treat both alike."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskFull) as full, disk_errors(tmp_path):
            write(tmp_path / "file.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"no space left for {tmp_path}" in one_line(full.value)


def test_a_folder_that_is_gone_is_one_line_and_a_file_that_is_missing_is_no_matter_of_it(
    tmp_path: Path,
):
    with pytest.raises(StoreGone) as gone, disk_errors(tmp_path / "store"):
        (tmp_path / "store" / "file").read_text()
    assert "not there any more" in one_line(gone.value)
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "file").read_text()
