"""A table as data, and the one place where it becomes text: terminal, Markdown, LaTeX and JSON."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from finrepro.evidence.files import json_text

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
}
GAP = 3  # blanks between columns in the terminal
NAMES, NAME_WIDTH = (
    4,
    22,
)  # the columns on the left that name a line, and how wide the terminal keeps them


@dataclass(frozen=True)
class Line:
    """One row: its texts, and the evidence behind them for the JSON. `section` starts a new
    group of rows when it changes.
    """

    texts: tuple[str, ...]
    section: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A finished table. `name` is the catalogue's; `label` the LaTeX label without `tab:`;
    `notes` stand below it.
    """

    name: str
    label: str
    caption: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The caption with the table's number, for where nothing else numbers it."""
        return f"Table {self.name.removeprefix('table')}. {self.caption}"


def to_json(table: Table) -> str:
    """Everything, run ids and unrounded values included."""
    return json_text(asdict(table))


def to_markdown(table: Table) -> str:
    """A pipe table with its caption above and its notes below."""

    def row(texts: tuple[str, ...]) -> str:
        return (
            "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"
        )

    body = [
        row(table.columns),
        "|" + "---|" * len(table.columns),
        *(row(line.texts) for line in table.lines),
    ]
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([f"**{table.title}**", "", *body, "", *notes]).rstrip() + "\n"


def escape(text: str) -> str:
    """Text as LaTeX."""
    plain = text.encode("latin-1", "replace").decode(
        "latin-1"
    )  # a library's message may hold anything; T1 fonts do not
    text = "".join(_LATEX.get(character, character) for character in plain)
    return text.replace("--", "-{}-")  # two hyphens would become a dash


def to_latex(table: Table) -> str:
    """A booktabs table environment; the same rows give the same bytes."""
    lines, previous = [], None
    for line in table.lines:
        if previous is not None and line.section != previous:
            lines.append(r"\midrule")
        previous = line.section
        lines.append(" & ".join(escape(text) for text in line.texts) + r" \\")
    notes = "\\par\n".join(
        escape(note) for note in table.notes
    )  # after a line break TeX would read "[1]" and "*" as its options
    return "\n".join(
        [
            "% Generated from results by finrepro; do not edit.",
            r"\providecommand{\resizebox}[3]{#3} % graphicx makes a wide table fit; without it the table is set as it is",
            r"\begin{table*}",
            r"\centering\small",
            rf"\caption{{{escape(table.caption)}}}\label{{tab:{table.label}}}",
            r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(escape(column) for column in table.columns) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            *([rf"\par\smallskip\raggedright\footnotesize {notes}\par"] if notes else []),
            r"\end{table*}",
            "",
        ]
    )


def widths(table: Table, room: int) -> list[int]:
    """Columns' widths that fit `room` characters where they can: all as wide as their texts, or
    those behind the names folded at words.

    What is left over goes to the columns that miss most, in turn.
    """
    texts = [
        [column, *(line.texts[index] for line in table.lines)]
        for index, column in enumerate(table.columns)
    ]
    whole = [max(map(len, column)) for column in texts]
    words = [
        max([len(word) for text in column for word in text.split()], default=1) for column in texts
    ]
    least = [min(word, NAME_WIDTH) if index < NAMES else word for index, word in enumerate(words)]
    spare = room - sum(least) - GAP * len(least)
    for _ in range(max(0, spare)):
        missing = [all_of_it - so_far for all_of_it, so_far in zip(whole, least, strict=True)]
        if max(missing, default=0) <= 0:
            break
        least[missing.index(max(missing))] += 1
    return least


def to_rich(table: Table, room: int | None = None) -> "RichTable":
    """For the terminal; of `room` characters, where that is known."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(
        title=Text(table.title),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    given = widths(table, room) if room else [None] * len(table.columns)
    for index, column in enumerate(table.columns):
        longest = max(
            [len(word) for line in table.lines for word in line.texts[index].split()], default=0
        )
        whole = (
            min(longest, NAME_WIDTH) if index < NAMES else None
        )  # names stay in one piece, the rest folds first
        shown.add_column(Text(column), overflow="fold", min_width=whole, width=given[index])
    previous = None
    for line in table.lines:
        if previous is not None and line.section != previous:
            shown.add_section()
        previous = line.section
        shown.add_row(*(Text(text) for text in line.texts))
    shown.caption = (
        Text("\n".join(table.notes)) if table.notes else None
    )  # not markup: reasons may hold brackets
    shown.caption_justify = "left"
    return shown
