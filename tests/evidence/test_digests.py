"""A file is hashed once while it stays what it was, and again when it changes."""

import os
import shutil
import time
from pathlib import Path

import pytest

from finrepro.evidence import digests
from finrepro.evidence.digests import Digests
from finrepro.evidence.manifest import file_digest


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(digests, "file_digest", counted)
    return names


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that has lain there for a while: without a wait, time itself goes on."""
    path = tmp_path / "run" / "weights"
    path.parent.mkdir()
    path.write_bytes(bytes(1000))
    now = time.time()
    monkeypatch.setattr(digests.time, "time", lambda: now + 60)
    return path


def changed(path: Path) -> None:
    """One bit, and the time that the file had."""
    times = path.stat()
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_it_is_read_once_in_all_processes(weights: Path, reads: list[str], tmp_path: Path) -> None:
    right = file_digest(weights)
    for _ in range(2):  # another process reads what the first one has kept
        known = Digests(tmp_path / "cache" / "sha256")
        assert known.of(weights) == known.of(weights) == right
    moved = weights.parent.rename(tmp_path / "sealed") / "weights"
    assert Digests(tmp_path / "cache" / "sha256").of(moved) == right
    assert reads == ["weights"]
    assert Digests(tmp_path / "cache" / "sha256").read(moved) == right
    assert reads == ["weights", "weights"], "asked for, it is read whatever is known"


def test_it_is_read_again_when_it_changes_at_equal_size_and_time(
    weights: Path, reads: list[str], tmp_path: Path
) -> None:
    known = Digests(tmp_path / "sha256")
    before = known.of(weights)
    changed(weights)
    assert known.of(weights) == file_digest(weights) != before
    shutil.copy2(weights, tmp_path / "copy")
    assert known.of(tmp_path / "copy") == file_digest(weights)
    assert reads == ["weights", "weights", "copy"]


def test_what_has_just_changed_is_not_taken_for_known(reads: list[str], tmp_path: Path) -> None:
    """Two changes within the clock of a file system look like one."""
    path, known = tmp_path / "new", Digests(tmp_path / "sha256")
    path.write_bytes(b"x")
    assert known.of(path) == known.of(path)
    assert reads == ["new", "new"]


@pytest.mark.parametrize("damage", [b"\xff\n1 2 3\n", b"1 2 3 4 5 6\n", b"a b c d e f\n", b"1 2"])
def test_a_list_that_is_damaged_is_read_as_far_as_it_goes(
    weights: Path, reads: list[str], tmp_path: Path, damage: bytes
) -> None:
    path = tmp_path / "sha256"
    right = Digests(path).of(weights)
    path.write_bytes(damage + b"\n" + path.read_bytes() + damage)
    assert Digests(path).of(weights) == right and reads == ["weights"]


def test_where_nothing_can_be_kept_files_are_read(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Digests(tmp_path / "file" / "sha256").of(weights) == file_digest(weights)
