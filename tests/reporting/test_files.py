"""Law: a table's files are written together, each the old one or the new; a full disk is a line."""

import errno
import json
from pathlib import Path

import pytest

from finrepro.errors import EnvironmentFault
from finrepro.evidence.files import write_bytes
from finrepro.reporting import files
from finrepro.reporting.dots import draw
from finrepro.reporting.table import Line, Table

TABLE = Table("table9", "table9_smoke", "A caption", ("A", "B"), (Line(("1", "2"), "x"),))


def test_a_table_is_markdown_latex_and_json_and_with_a_figure_two_pictures(tmp_path: Path):
    path = tmp_path / "tables" / "smoke" / "table9-quick.v2"
    files.write_table(tmp_path, path, TABLE)
    names = [f"table9-quick.v2.{suffix}" for suffix in ("json", "md", "tex")]
    assert sorted(each.name for each in path.parent.iterdir()) == names
    assert json.loads(path.with_name(names[0]).read_text())["caption"] == "A caption"
    files.write_table(tmp_path, path, TABLE, draw((), "A caption"))
    assert len(list(path.parent.iterdir())) == 5
    assert path.with_name("table9-quick.v2.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in path.with_name("table9-quick.v2.svg").read_text()


def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "tables" / "table9"
    files.write_table(tmp_path, path, TABLE)
    old = path.with_name("table9.tex").read_bytes()

    def full(target: Path, content: bytes) -> None:
        if target.suffix == ".tex":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_bytes(target, content)

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(EnvironmentFault, match=f"no space left for {tmp_path} "):
        files.write_table(tmp_path, path, Table("table9", "l", "Another", ("A",), ()))
    assert path.with_name("table9.tex").read_bytes() == old
