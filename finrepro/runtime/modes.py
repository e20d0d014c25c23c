"""Who may read what is written: everybody whom the umask lets, as of any other file."""

from pathlib import Path


def make_readable(folder: Path) -> None:
    """Give every file below `folder` the mode of a new file: safetensors writes 0600, and another
    account could neither verify nor load it.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
