"""Law: a table is a pure function of results - every cell has its line or its reason, smoke is marked, and equal rows give equal bytes."""

import json
from typing import Any

import pytest

from finrepro.render import Line, Table, escape, to_json, to_latex, to_markdown, to_rich
from finrepro.report.table3 import COLUMNS, build


def score(metric: str, value: float, task: str = "tfns", **more: Any) -> dict[str, Any]:
    bounds = {
        "low": value - 0.02,
        "high": value + 0.02,
        "gain": value - 0.656,
        "gain_low": value - 0.676,
        "gain_high": value - 0.636,
    }
    constants = {"accuracy": 0.656 if task == "tfns" else 0.602, "f1_weighted": 0.519, "f1_macro": 0.264, "mcc": 0.0}
    fixed = {
        "task": task,
        "metric": metric,
        "value": value,
        "n": 2388,
        "constant": constants[metric],
        "constant_answer": "neutral",
    }
    return fixed | bounds | more


def row(adapter: str, seed: int = 0, accuracy: float | None = None, **changes: Any) -> dict[str, Any]:
    names = {"model": "gpt2_127m_mini", "quantizer": "none", "adapter": adapter, "train_on": "tfns"}
    task, below = changes.get("train_on", "tfns"), {"accuracy": 0.0, "f1_weighted": 0.01, "f1_macro": 0.1, "mcc": 0.3}
    scores = [] if accuracy is None else [score(metric, accuracy - less, task) for metric, less in below.items()]
    label = f"gpt2_127m_mini-none-{adapter}-tfns-s{seed}"
    state = "done" if scores else "not run"
    return {**names, "seed": seed, "label": label, "run_id": f"{adapter:0<11}{seed}", "state": state, "reason": "", "short": False,
            "scores": scores, "costs": {"train_seconds": 1.0}} | changes  # fmt: skip


ROWS = [
    row("full", 0, 0.78),
    row("lora_r8", 0, 0.70),
    row("lora_r8", 1, 0.72),
    row("lora_r8", 2, 0.74),
    row("pissa", state="skipped", reason="needs 41.2 GiB, this machine has 24"),
    row("dora", state="failed", reason="RuntimeError: 50 % of x_1 & y"),
    row("vera", 0, 0.66, short=True),
    row("rosa", 0, 0.69, state="stale", reason="made by other source or packages"),
]


def lines(rows: list[dict[str, Any]], scale: str = "smoke") -> dict[str, dict[str, str]]:
    """Adapter column -> the line's texts by column."""
    table = build(rows, scale)
    return {line.texts[3]: dict(zip(table.columns, line.texts, strict=True)) for line in table.lines}


def test_the_best_constant_answer_heads_each_task():
    table = build([*ROWS, row("full", 0, 0.7, train_on="fpb")], "smoke")
    heads = [line for line in table.lines if line.texts[1].startswith("always ")]
    assert [line.texts[0] for line in heads] == ["tfns", "fpb"]
    assert table.lines[0] is heads[0]
    assert heads[0].texts[1:8] == ("always neutral", "", "", "0.656", "0.519", "0.264", "0.000")
    assert heads[1].texts[1:5] == ("always neutral", "", "", "0.602")


def test_a_line_shows_the_score_its_interval_its_gain_and_its_size():
    line = lines(ROWS)["full"]
    assert line["Accuracy [95 %]"] == "0.780 [0.760, 0.800]"
    assert line["Over constant"] == "+0.124 [+0.104, +0.144]"
    assert (line["n"], line["Seeds"]) == ("2388", "1")


def test_several_seeds_are_averaged_with_their_spread():
    line = lines(ROWS)["lora_r8"]
    assert line["Accuracy [95 %]"] == "0.720 [0.700, 0.740]"
    assert line["Seeds"] == "3 (sd 0.020)"


def test_a_cell_without_a_score_keeps_its_line_and_its_reason():
    table = build(ROWS, "smoke")
    assert lines(ROWS)["pissa"]["Accuracy [95 %]"] == "- (skipped)"
    assert lines(ROWS)["dora"]["Accuracy [95 %]"] == "- (failed)"
    notes = "\n".join(table.notes)
    assert "needs 41.2 GiB, this machine has 24" in notes and "RuntimeError: 50 % of x_1 & y" in notes
    assert "pissa" in notes and "dora" in notes


def test_no_cell_is_lost_and_none_is_made_up():
    table = build(ROWS, "smoke")
    cells = [cell for line in table.lines for cell in line.evidence.get("cells", [])]
    assert [cell["label"] for cell in cells] == [row["label"] for row in ROWS]
    assert all("nan" not in text for line in table.lines for text in line.texts)


def test_stale_and_short_cells_are_marked():
    assert lines(ROWS)["rosa"]["Accuracy [95 %]"].endswith(" *")
    assert lines(ROWS)["vera"]["Accuracy [95 %]"].endswith(" (short)")
    notes = build(ROWS, "smoke").notes
    assert any(note.startswith("* ") and "rosa" in note for note in notes)
    assert any(note.startswith("(short)") for note in notes)
    assert not any(note.startswith(("* ", "(short)")) for note in build(ROWS[:4], "smoke").notes)


@pytest.mark.parametrize("render", [to_markdown, to_latex, to_json])
def test_smoke_is_in_the_caption_of_every_form_and_not_in_that_of_paper(render):
    assert "SMOKE" in render(build(ROWS, "smoke"))
    assert "SMOKE" not in render(build(ROWS, "paper")).replace("mini", "")


def test_smoke_is_in_the_terminal_too():
    assert "SMOKE" in str(to_rich(build(ROWS, "smoke")).title)


def test_a_single_seed_is_marked():
    assert any("single seed" in note for note in build(ROWS, "smoke").notes)
    assert not any("single seed" in note for note in build(ROWS[1:4], "smoke").notes)


def test_a_table_of_nothing_but_reasons_still_prints():
    table = build([row(name, state="skipped", reason="no weights") for name in ("full", "lora_r8")], "paper")
    assert len(table.lines) == 2 and "no weights" in "\n".join(table.notes)
    assert to_markdown(table) and to_latex(table) and to_rich(table).row_count == 2


def test_a_table_of_no_cells_prints_its_head():
    assert to_markdown(build([], "smoke")).count("|") > len(COLUMNS)


def test_the_json_has_run_ids_and_unrounded_values():
    table = json.loads(to_json(build(ROWS, "smoke")))
    cells = [cell for line in table["lines"] for cell in line["evidence"].get("cells", [])]
    assert {cell["run_id"] for cell in cells} == {row["run_id"] for row in ROWS}
    values = [score["value"] for cell in cells for score in cell["scores"] if score["metric"] == "f1_weighted"]
    assert 0.78 - 0.01 in values


def test_equal_rows_give_equal_bytes_and_other_rows_others():
    for render in (to_markdown, to_latex, to_json):
        assert render(build(ROWS, "smoke")) == render(build(json.loads(json.dumps(ROWS)), "smoke"))
        assert render(build(ROWS, "smoke")) != render(build([row("full", 0, 0.781), *ROWS[1:]], "smoke"))


@pytest.mark.parametrize("text", ["a_b", "50 %", "R&D", "$5", "#1", "{x}", "a\\b", "a^b", "~5"])
def test_latex_has_no_bare_special_character(text: str):
    bare = escape(text)
    for done in (
        r"\textbackslash{}",
        r"\textasciicircum{}",
        r"\textasciitilde{}",
        r"\&",
        r"\%",
        r"\$",
        r"\#",
        r"\_",
        r"\{",
        r"\}",
    ):
        bare = bare.replace(done, "")
    assert not set(bare) & set("\\&%$#_{}^~"), escape(text)
    assert escape(text) != text


def test_a_latex_table_has_as_many_columns_in_every_line_and_rules_between_tasks():
    other = row("full", 0, 0.7, train_on="fpb")
    text = to_latex(build([*ROWS, other], "smoke"))
    body = [line for line in text.splitlines() if line.endswith(r" \\") and " & " in line]
    assert {line.replace(r"\&", "").count("&") for line in body} == {len(COLUMNS) - 1}
    assert text.count(r"\midrule") == 2
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    assert r"\label{tab:table3_smoke}" in text and r"x\_1 \& y" in text


def test_markdown_keeps_its_columns_whatever_a_text_holds():
    table = Table("x", "Caption", ("a", "b"), (Line(("1|2", "3\n4")),), ("note | x",))
    body = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    assert len(body) == 3
    assert [line.replace("\\|", "").count("|") for line in body] == [3, 3, 3]


def test_the_terminal_table_takes_square_brackets_as_text():
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    Console(file=out, width=250).print(to_rich(build(ROWS, "smoke")))
    assert "0.780 [0.760, 0.800]" in out.getvalue() and "needs 41.2 GiB" in out.getvalue()
