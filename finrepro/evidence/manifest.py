"""The manifest of a folder: every file's sha256, in the format that `sha256sum -c` checks
without this package.
"""

import hashlib
from pathlib import Path


def file_digest(path: Path) -> str:
    """sha256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """List every file's sha256, in the format of `sha256sum`."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.sha256"
    )
    lines = [f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / "manifest.sha256").write_text("".join(lines), encoding="utf-8")


def damaged_files(folder: Path) -> list[str]:
    """Names of files that are missing or differ from the manifest, of files that it does not
    list, and of a missing manifest.
    """
    manifest = folder / "manifest.sha256"
    if not manifest.is_file():
        return ["manifest.sha256"]
    listed = {}
    for line in manifest.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {
        "manifest.sha256"
    }
    changed = {
        name
        for name, digest in listed.items()
        if name not in present or file_digest(folder / name) != digest
    }
    return sorted(changed | (present - set(listed)))
