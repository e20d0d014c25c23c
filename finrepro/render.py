"""A table as data, and the one place where it becomes text: terminal, Markdown, LaTeX and JSON."""

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
}


@dataclass(frozen=True)
class Line:
    """One row: its texts, and the evidence behind them for the JSON. `section` starts a new group of rows when it changes."""

    texts: tuple[str, ...]
    section: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A finished table. `label` is the LaTeX label without `tab:`; `notes` stand below it."""

    label: str
    caption: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()


def to_json(table: Table) -> str:
    """Everything, run ids and unrounded values included."""
    return json.dumps(asdict(table), indent=2, ensure_ascii=False) + "\n"


def to_markdown(table: Table) -> str:
    """A pipe table with its caption above and its notes below."""

    def row(texts: tuple[str, ...]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"

    body = [row(table.columns), "|" + "---|" * len(table.columns), *(row(line.texts) for line in table.lines)]
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([f"**{table.caption}**", "", *body, "", *notes]).rstrip() + "\n"


def escape(text: str) -> str:
    """Text as LaTeX."""
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(table: Table) -> str:
    """A booktabs table environment; the same rows give the same bytes."""
    lines, previous = [], None
    for line in table.lines:
        if previous is not None and line.section != previous:
            lines.append(r"\midrule")
        previous = line.section
        lines.append(" & ".join(escape(text) for text in line.texts) + r" \\")
    notes = r" \\ ".join(escape(note) for note in table.notes)
    return "\n".join(
        [
            "% Generated from results by finrepro; do not edit.",
            r"\begin{table*}",
            r"\centering\small",
            rf"\caption{{{escape(table.caption)}}}\label{{tab:{table.label}}}",
            rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(escape(column) for column in table.columns) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            *([rf"\par\smallskip\footnotesize {notes}"] if notes else []),
            r"\end{table*}",
            "",
        ]
    )


def to_rich(table: Table) -> "RichTable":
    """For the terminal."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(
        title=table.caption, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False
    )
    for column in table.columns:
        shown.add_column(column, overflow="fold")
    previous = None
    for line in table.lines:
        if previous is not None and line.section != previous:
            shown.add_section()
        previous = line.section
        shown.add_row(*(Text(text) for text in line.texts))
    shown.caption = "\n".join(table.notes) or None
    shown.caption_justify = "left"
    return shown
