"""A table as data, and its text forms: terminal, Markdown, LaTeX and JSON."""

from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
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
# The columns on the left that name a line, and their width in the terminal that is not folded.
NAME_COLUMNS, NAME_WIDTH = 4, 22


@dataclass(frozen=True)
class Line:
    """One row: its texts, and their evidence for the JSON. A rule separates sections."""

    texts: tuple[str, ...]
    section: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A finished table. `name` is the catalogue's; `label` the LaTeX label without `tab:`; `notes`
    are printed below it.
    """

    name: str
    label: str
    caption: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The caption with the table's number, which LaTeX sets by itself."""
        return f"Table {self.name.removeprefix('table')}. {self.caption}"


def without_columns(table: Table, dropped: AbstractSet[int]) -> Table:
    """The table without the columns of these indices."""
    indices = [index for index in range(len(table.columns)) if index not in dropped]
    lines = tuple(
        replace(line, texts=tuple(line.texts[index] for index in indices)) for line in table.lines
    )
    columns = tuple(table.columns[index] for index in indices)
    return replace(table, columns=columns, lines=lines)


def to_json(table: Table) -> str:
    """The table with its evidence: run ids and unrounded values."""
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
    # A library's message may hold any character; T1 fonts do not.
    latin = text.encode("latin-1", "replace").decode("latin-1")
    text = "".join(_LATEX.get(character, character) for character in latin)
    return text.replace("--", "-{}-")  # two hyphens would become a dash


def to_latex(table: Table) -> str:
    """A booktabs table environment; the same rows give the same bytes."""
    lines, previous = [], None
    for line in table.lines:
        if previous is not None and line.section != previous:
            lines.append(r"\midrule")
        previous = line.section
        lines.append(" & ".join(escape(text) for text in line.texts) + r" \\")
    # Paragraphs: after a line break TeX would read "[1]" and "*" as its options.
    notes = "\\par\n".join(escape(note) for note in table.notes)
    return "\n".join(
        [
            "% Generated from results by finrepro; do not edit.",
            r"\providecommand{\resizebox}[3]{#3} "
            "% graphicx makes a wide table fit; without it the table is set as it is",
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
    """Columns' widths in `room` characters: each as wide as its longest text, or where that is too
    much, columns folded at words, but not those of names.

    Characters to spare go to the column that lacks most, one after another.
    """
    texts = [
        [column, *(line.texts[index] for line in table.lines)]
        for index, column in enumerate(table.columns)
    ]
    longest = [max(map(len, column)) for column in texts]
    words = [
        max([len(word) for text in column for word in text.split()], default=1) for column in texts
    ]
    columns = [
        min(word, NAME_WIDTH) if index < NAME_COLUMNS else word for index, word in enumerate(words)
    ]
    spare = room - sum(columns) - GAP * len(columns)
    for _ in range(max(0, spare)):
        lacking = [goal - width for goal, width in zip(longest, columns, strict=True)]
        if max(lacking, default=0) <= 0:
            break
        columns[lacking.index(max(lacking))] += 1
    return columns


def to_rich(table: Table, room: int | None = None) -> "RichTable":
    """For the terminal, `room` characters wide where that is known."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    rich_table = RichTable(
        title=Text(table.title),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    fixed = widths(table, room) if room else [None] * len(table.columns)
    for index, column in enumerate(table.columns):
        longest = max(
            [len(word) for line in table.lines for word in line.texts[index].split()], default=0
        )
        # Names stay in one piece: rich by itself folds them where another column could be folded.
        least = min(longest, NAME_WIDTH) if index < NAME_COLUMNS else None
        rich_table.add_column(Text(column), overflow="fold", min_width=least, width=fixed[index])
    previous = None
    for line in table.lines:
        if previous is not None and line.section != previous:
            rich_table.add_section()
        previous = line.section
        rich_table.add_row(*(Text(text) for text in line.texts))
    # As Text, not markup: reasons may hold brackets.
    rich_table.caption = Text("\n".join(table.notes)) if table.notes else None
    rich_table.caption_justify = "left"
    return rich_table
