"""No library may fetch compiled code from a hub: the package that does is in no lock, and is not
found where somebody has installed it.
"""

import re
from pathlib import Path

import pytest
from fixtures.process import python

from finrepro import PROJECT

LOCKS = sorted((PROJECT / "requirements").glob("*.*"))
PLANTED = """
raise SystemExit("the package kernels was imported")
"""
PROGRAM = """
import importlib.util
from finrepro.runtime import process
{quiet}
assert (importlib.util.find_spec("kernels") is None) == {hidden}
try:
    import kernels
except ImportError:
    print("not found")
"""


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_the_package_is_in_no_lock(path: Path) -> None:
    assert not re.search(r"^kernels\b", path.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("hidden", [True, False])
def test_the_package_is_not_found_where_it_is_installed(hidden: bool, tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(PLANTED)
    quiet = "process.quiet_environment()" if hidden else ""
    answer = python(
        "-c", PROGRAM.format(quiet=quiet, hidden=hidden), PYTHONPATH=f"{PROJECT}:{tmp_path}"
    )
    assert ("not found" in answer.stdout) == hidden, answer.stderr
