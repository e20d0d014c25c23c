"""Law: a table shows every text as it is: what a library says about its failure is neither
markup nor more than LaTeX's fonts hold.
"""

import io
import re

import pytest
from rich.console import Console

from finrepro.reporting.table import Line, Table, escape, to_latex, to_rich, widths

SAID = (
    "RuntimeError: [/__w/pytorch/pair.cc:553] Connection closed by peer [red] 50 % "
    "\U0001f3d6 \u2192 caf\u00e9"
)
TABLE = Table(
    "table3", "x", f"Caption {SAID}", ("a [b]",), (Line((SAID,)),), (f"cell - failed: {SAID}",)
)


def test_brackets_in_a_reason_are_text():
    shown = Console(file=io.StringIO(), width=200, color_system=None)
    shown.print(to_rich(TABLE))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert (
        text.count("[/__w/pytorch/pair.cc:553]") == 3
        and text.count("[red]") == 3
        and "a [b]" in text
    )


def test_what_the_fonts_lack_becomes_a_question_mark():
    assert escape("\U0001f3d6 caf\u00e9 \u2192") == "? caf\u00e9 ?"
    to_latex(TABLE).encode("latin-1")


def test_two_hyphens_stay_two():
    assert escape("--table 3") == "-{}-table 3"


WIDE = Table(
    name="table2",
    label="x",
    caption="x",
    columns=("Name", "A long heading", *("ab cd ef" for _ in range(10))),
    lines=(Line(("gpt2_1_5b_deep_mini", "one two three", *("12 34" for _ in range(10)))),),
)


@pytest.mark.parametrize("room", [90, 110, 160])
def test_no_column_of_a_wide_table_is_lost(room: int):
    console = Console(width=room, file=io.StringIO())
    console.print(to_rich(WIDE, room))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    heads = "\n".join(lines[: next(i for i, line in enumerate(lines) if "gpt2" in line)])
    assert len(re.findall(r"\bab\b", heads)) == 10 and all(len(line) <= room for line in lines)


def test_columns_are_as_wide_as_their_texts_or_folded_at_words_where_there_is_no_room():
    whole = [19, 14, *[8] * 10]
    assert widths(WIDE, 1000) == whole
    assert widths(WIDE, 10) == [19, 7, *[2] * 10]
    assert sum(widths(WIDE, 120)) <= 120 - 3 * 12
