"""Law: a table shows every text as it is: what a library says about its failure is neither markup nor more than LaTeX's fonts hold."""

import io

from rich.console import Console

from finrepro.render import Line, Table, escape, to_latex, to_rich

SAID = "RuntimeError: [/__w/pytorch/pair.cc:553] Connection closed by peer [red] 50 % \U0001f3d6 \u2192 caf\u00e9"
TABLE = Table("table3", "x", f"Caption {SAID}", ("a [b]",), (Line((SAID,)),), (f"cell - failed: {SAID}",))


def test_brackets_in_a_reason_are_text():
    shown = Console(file=io.StringIO(), width=200, color_system=None)
    shown.print(to_rich(TABLE))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("[/__w/pytorch/pair.cc:553]") == 3 and text.count("[red]") == 3 and "a [b]" in text


def test_what_the_fonts_lack_becomes_a_question_mark():
    assert escape("\U0001f3d6 caf\u00e9 \u2192") == "? caf\u00e9 ?"
    to_latex(TABLE).encode("latin-1")


def test_two_hyphens_stay_two():
    assert escape("--table 3") == "-{}-table 3"
