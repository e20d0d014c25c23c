"""The files of a table or a figure, each the old one or the new as a whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finrepro.evidence.files import disk_errors, write_bytes
from finrepro.reporting.dots import to_png, to_svg
from finrepro.reporting.table import Table, to_json, to_latex, to_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_table(root: Path, path: Path, table: Table, figure: "Figure | None" = None) -> None:
    """Write a table of the store at `root` as `path`.md, .tex and .json, its figure as .svg and
    .png. The caller holds the store's lock.

    Raises `EnvironmentFault` where the disk is full or the store cannot be written.
    """
    contents = {
        "md": to_markdown(table).encode(),
        "tex": to_latex(table).encode(),
        "json": to_json(table).encode(),
    }
    write_files(root, path, contents | (figure_files(figure) if figure else {}))


def figure_files(figure: "Figure") -> dict[str, bytes]:
    """The content of a figure's files, by suffix."""
    return {"svg": to_svg(figure).encode(), "png": to_png(figure)}


def write_files(root: Path, path: Path, contents: Mapping[str, bytes]) -> None:
    """Write `path`.<suffix> for each content of the store at `root`; folders are made.

    Raises `EnvironmentFault` where the disk is full or the store cannot be written.
    """
    with disk_errors(root):
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix, content in contents.items():
            write_bytes(path.with_name(f"{path.name}.{suffix}"), content)
