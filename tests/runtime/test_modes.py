"""What is written may be read by whom the umask lets, whatever a library gave it."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from finrepro.runtime.modes import make_readable


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_of_any_new_file(umask: int, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.touch(0o600)
    (tmp_path / "link").symlink_to(outside)
    before = os.umask(umask)
    try:
        save_file({"a": np.ones(2)}, tmp_path / "base" / "model.safetensors")
        make_readable(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "base" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert outside.stat().st_mode & 0o777 == 0o600, "what a link leads to is not ours"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "link"]
