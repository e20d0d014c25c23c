"""Law: a table is a pure function of results - every cell has its line or its reason, smoke is
marked, and equal rows give equal bytes.
"""

import json
import re
from typing import Any

import numpy as np
import pytest

from finrepro.catalogue.reader import published
from finrepro.reporting.curves import Chart, Curve, draw_charts
from finrepro.reporting.dots import Dot, Panel, as_written, draw, to_png, to_svg
from finrepro.reporting.scores import THIRD_DECIMAL_BELOW, bounds
from finrepro.reporting.table import Line, Table, escape, to_json, to_latex, to_markdown, to_rich
from finrepro.reporting.tables import table3, table5
from finrepro.reporting.tables.table3 import COLUMNS, TITLES, build, panels

PUBLISHED = published()
SCORE = "Score [95 %]"
ENTITIES = {
    "f1_entity": 0.0,
    "precision_entity": -0.05,
    "recall_entity": 0.04,
    "unparsable_rate": 0.6,
}


def score(metric: str, value: float, task: str = "tfns", **more: Any) -> dict[str, Any]:
    bounds = {
        "low": value - 0.02,
        "high": value + 0.02,
        "gain": value - 0.656,
        "gain_low": value - 0.676,
        "gain_high": value - 0.636,
    }
    constants = {
        "accuracy": 0.656 if task == "tfns" else 0.602,
        "f1_weighted": 0.519,
        "f1_macro": 0.264,
        "mcc": 0.0,
    }
    fixed = {
        "task": task,
        "metric": metric,
        "value": value,
        "n": 2388,
        "constant": constants.get(metric),
        "constant_answer": "neutral" if metric in constants else None,
    }
    return fixed | bounds | more


COSTS = {
    "total_params": 724480,
    "trainable_params": 24576,
    "base_bytes": 2_897_920,
    "trained_file_bytes": 99_000,
    "peak_memory_bytes": 3 * 2**29,
    "train_seconds": 12.5,
    "useful_token_share": 0.962,
    "tokens_per_second": 5432.1,
}


def row(
    adapter: str, seed: int = 0, accuracy: float | None = None, **changes: Any
) -> dict[str, Any]:
    names = {
        "model": "gpt2_127m_mini",
        "quantizer": "none",
        "adapter": adapter,
        "train_on": "tfns",
    } | {key: changes.pop(key) for key in ("model", "quantizer", "train_on") if key in changes}
    tasks = changes.pop("tasks", [names["train_on"]])
    below = {"accuracy": 0.0, "f1_weighted": 0.01, "f1_macro": 0.1, "mcc": 0.3}
    scores = [
        score(metric, accuracy - less, task)
        for task in tasks
        for metric, less in (ENTITIES if task == "fin_ner" else below).items()
        if accuracy is not None
    ]
    label = "-".join((*names.values(), f"s{seed}"))
    state = "done" if scores else "not run"
    return {
        **names,
        "seed": seed,
        "label": label,
        "run_id": f"{label:->12}",
        "state": state,
        "reason": "",
        "short": False,
        "adapter_kind": "base" if adapter == "base" else "lora",
        "weights": "pretrained",
        "decoded_from": None,
        "notes": [],
        "devices": 1,
        "batch": 32,
        "tasks": tasks,
        "prompts": {},
        "scores": scores,
        "costs": COSTS if scores else {},
    } | changes


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


def lines(
    rows: list[dict[str, Any]], scale: str = "smoke", values: Any = ()
) -> dict[str, dict[str, str]]:
    """Adapter column -> the line's texts by column."""
    table = build(rows, scale, values)
    return {
        line.texts[3]: dict(zip(table.columns, line.texts, strict=True)) for line in table.lines
    }


def cells(table: Table) -> list[str]:
    return [cell["label"] for line in table.lines for cell in line.evidence.get("cells", [])]


def test_the_best_constant_answer_heads_each_task():
    table = build([*ROWS, row("full", 0, 0.7, train_on="fpb")], "smoke")
    heads = [line for line in table.lines if line.texts[1].startswith("always ")]
    assert [line.texts[0] for line in heads] == ["tfns", "fpb"]
    assert table.lines[0] is heads[0]
    assert heads[0].texts[1:6] == ("always neutral", "", "", "0.656", "0.519 / 0.264 / 0.000")
    assert heads[1].texts[1:5] == ("always neutral", "", "", "0.602")


def test_a_line_shows_the_score_its_interval_its_gain_and_its_size():
    line = lines(ROWS)["full"]
    assert line[SCORE] == "0.780 [0.76, 0.80]"
    assert line["Further"] == "0.770 / 0.680 / 0.480"
    assert line["Over constant"] == "+0.124 [+0.10, +0.14]"
    assert (line["n"], line["Seeds"]) == ("2388", "1")


def test_several_seeds_are_averaged_and_their_spread_widens_the_interval():
    line = lines(ROWS)["lora_r8"]
    half = (
        0.02**2 + (4.302653 * 0.02 / 3**0.5) ** 2
    ) ** 0.5  # examples, and t(2) times the mean's standard error
    assert line[SCORE] == f"0.720 [{0.72 - half:.2f}, {0.72 + half:.2f}]"
    assert line["Seeds"] == "3 (sd 0.020)"


def test_a_task_of_entities_shows_its_metrics_and_a_cell_stands_under_each_task_it_was_scored_on():
    table = build(
        [*ROWS, row("full", 0, 0.7, train_on="some_mix", tasks=["tfns", "fin_ner"])], "smoke"
    )
    found = [
        dict(zip(table.columns, line.texts, strict=True))
        for line in table.lines
        if "some_mix" in line.texts
    ]
    assert [line["Task"] for line in found] == ["tfns", "fin_ner"]
    assert found[0]["Further"] == "0.690 / 0.600 / 0.400"
    assert found[1]["Further"] == "0.750 / 0.660 / 0.100"
    mixed = [line for line in table.lines if "some_mix" in line.texts]
    assert [
        {s["task"] for cell in line.evidence["cells"] for s in cell["scores"]} for line in mixed
    ] == [
        {"tfns"},
        {"fin_ner"},
    ]
    assert "Trained on" not in build(ROWS, "smoke").columns
    assert lines([*ROWS, row("base", 0, 0.3), mixed_row()], "smoke")["base"]["Trained on"] == "-"


def mixed_row() -> dict[str, Any]:
    return row("full", 0, 0.7, train_on="some_mix", tasks=["tfns"])


def test_devices_and_batch_are_told_apart_where_they_differ():
    table = build(
        [row("full", 0, 0.7), row("full", 0, 0.7, devices=2), row("full", 0, 0.7, batch=8)], "smoke"
    )
    names = [line.texts[3] for line in table.lines if line.texts[3]]
    assert names == ["full (batch 32)", "full (batch 32) (2 devices)", "full (batch 8)"]


def test_a_failed_cell_keeps_its_line_and_one_without_result_its_reason():
    table = build(ROWS, "smoke")
    assert lines(ROWS)["pissa"][SCORE] == "- (skipped)"
    assert lines(ROWS)["dora"][SCORE] == "- (failed)"
    assert table.lines[-1].texts[3] == "pissa"
    notes = "\n".join(table.notes)
    assert (
        "needs 41.2 GiB, this machine has 24" in notes and "RuntimeError: 50 % of x_1 & y" in notes
    )
    assert "pissa" in notes and "dora" in notes


def test_hundreds_of_skipped_cells_are_a_line_a_model_and_reason_and_none_is_lost():
    skipped = [
        row(
            adapter,
            seed,
            model=model,
            quantizer=quantizer,
            train_on=task,
            state=state,
            reason=f"no weights of {model}",
        )
        for model in ("llama2_7b", "llama2_13b")
        for quantizer in ("none", "int8", "nf4")
        for adapter, state in (
            ("base", "skipped"),
            ("lora_r4", "skipped"),
            ("lora_r8", "skipped"),
            ("full", "refused"),
        )
        for task in ("tfns", "fpb", "fiqa_sa")
        for seed in range(3)
    ]
    table = build([*ROWS, *skipped], "paper")
    last = [line.texts for line in table.lines if line.section == "without result"][1:]
    assert [texts[:6] for texts in last] == [
        (f"{3} tasks", model, "3 quantizers", adapters, f"- ({state})", f"{count} cells")
        for model in ("llama2_7b", "llama2_13b")
        for adapters, state, count in (("3 adapters", "skipped", 81), ("full", "refused", 27))
    ]
    assert sorted(cells(table)) == sorted(r["label"] for r in [*ROWS, *skipped])
    assert any(
        "81 cells, as llama2_7b-none-base-tfns-s0 - skipped: no weights of llama2_7b" in n
        for n in table.notes
    )


def test_no_cell_is_lost_and_none_is_made_up():
    table = build(ROWS, "smoke")
    assert sorted(cells(table)) == sorted(row["label"] for row in ROWS)
    assert all("nan" not in text for line in table.lines for text in line.texts)


def test_stale_and_short_cells_are_marked():
    assert lines(ROWS)["rosa"][SCORE].endswith(" *")
    assert lines(ROWS)["vera"][SCORE].endswith(" (short)")
    notes = build(ROWS, "smoke").notes
    assert any(note.startswith("* ") and "rosa" in note for note in notes)
    assert any(note.startswith("(short)") for note in notes)
    assert not any(note.startswith(("* ", "(short)")) for note in build(ROWS[:4], "smoke").notes)


def test_a_remark_of_a_cell_stands_once_below():
    rows = [
        row("full", 0, 0.7, notes=["CPU int8, not LLM.int8"]),
        row("lora_r8", 0, 0.7, notes=["CPU int8, not LLM.int8"]),
    ]
    assert [n for n in build(rows, "smoke").notes if "LLM.int8" in n] == [
        f"2 cells, as {rows[0]['label']} - CPU int8, not LLM.int8"
    ]


def test_random_weights_show_what_they_cost_and_no_quality():
    tuned = {
        "model": "llama2_7b_chat",
        "quantizer": "int8",
        "train_on": "fingpt_mix",
        "tasks": ["tfns"],
    }
    for accuracy in (None, 0.9):  # even where something was scored
        line = lines(
            [row("lora_r8", 0, accuracy, weights="random", state="done", costs=COSTS, **tuned)],
            "paper",
            PUBLISHED,
        )["lora_r8"]
        assert line[SCORE] == "- (random weights)" and line["Further"] == "1.50 GiB, 5,432 tokens/s"
        assert "Published" not in line and line["n"] == ""


def reasons_of(table: Table, beginning: str) -> str:
    """The reasons that a note names, in words."""
    (note,) = [note for note in table.notes if note.startswith(beginning)]
    keys = note.rsplit(": ", 1)[1].rstrip(".").split(", ")
    words = dict(note.split(": ", 1) for note in table.notes if re.match(r"r\d+: ", note))
    return "; ".join(words[key] for key in keys)


TUNED = {
    "model": "llama2_7b_chat",
    "quantizer": "int8",
    "train_on": "fingpt_mix",
    "tasks": ["tfns"],
}


def test_published_values_stand_beside_paper_cells_only():
    rows = [row("lora_r8", seed, 0.893 + seed / 1000, **TUNED) for seed in range(3)]
    line = lines(rows, "paper", PUBLISHED)["lora_r8"]
    assert line["Published"] == "acc 0.894, fingpt [1]"
    assert line["Verdict"].startswith("EQUIVALENT with reservations: +0.000, margin 0.025")
    table = build(rows, "paper", PUBLISHED)
    (note,) = [note for note in table.notes if note.startswith("[1] ")]
    assert "Llama-2-7b-chat" in note and "with reservations: r1, r2" in note
    text = reasons_of(table, "[1] ")
    assert "label likelihoods here" in text and "alpha 32" in text and "a single run" in text
    assert "Published" not in build(rows, "smoke", PUBLISHED).columns
    smoke = to_json(build(rows, "smoke", PUBLISHED))
    assert "fingpt [" not in smoke and '"published"' not in smoke
    assert {each["value"] for each in table.lines[1].evidence["published"]} == {0.894, 0.866}


def test_a_far_score_differs_and_a_single_seed_is_marked_in_the_verdict():
    line = lines([row("lora_r8", 0, 0.70, **TUNED)], "paper", PUBLISHED)["lora_r8"]
    assert line["Verdict"].startswith(
        "DIFFERS with reservations: -0.194, margin 0.025, 1 seed only"
    )


def test_another_variant_of_the_model_is_named_as_not_comparable():
    line = lines([row("lora_r8", 0, 0.894, **TUNED | {"model": "llama2_7b"})], "paper", PUBLISHED)
    assert line["lora_r8"]["Verdict"] == "not comparable" and line["lora_r8"][
        "Published"
    ].startswith("acc 0.894, fingpt")
    notes = "\n".join(
        build(
            [row("lora_r8", 0, 0.894, **TUNED | {"model": "llama2_7b"})], "paper", PUBLISHED
        ).notes
    )
    assert "Llama-2-7b-chat there, llama2_7b here" in notes


def test_a_published_value_of_another_task_or_metric_is_named_and_its_reason_stands_once():
    named = {"model": "llama3_1_8b_instruct", "quantizer": "int8"}
    rows = [
        row("lora_r8", seed, 0.85, train_on=task, **named)
        for task in ("fin_ner", "fpb", "nwgi_7")
        for seed in range(3)
    ]
    table = build(rows, "paper", PUBLISHED)
    shown = [
        (line.texts[0], *line.texts[-4:-2]) for line in table.lines if line.texts[3] == "lora_r8"
    ]
    assert shown[0] == ("fin_ner", "acc 0.9805, finlora [1]", "not comparable")
    assert "the type of a given span" in reasons_of(table, "[1] ")
    averaged = [note for note in table.notes if "not a weighted F1" in note]
    assert len(averaged) == 1 and averaged[0].startswith("r")
    others = [
        note
        for note in table.notes
        if note.startswith("Published, in the JSON only: finlora.lora.ner.f1 and ")
    ]
    assert len(others) == 1 and others[0].endswith(f"not comparable: {averaged[0].split(':')[0]}.")


def test_a_published_f1_has_no_margin_and_no_verdict():
    alone = [value for value in PUBLISHED if value.metric == "f1"]
    line = lines([row("lora_r8", 0, 0.85, **TUNED)], "paper", alone)["lora_r8"]
    assert (
        line["Published"].startswith("f1 0.894, fingpt") and line["Verdict"] == "no margin is known"
    )


@pytest.mark.parametrize("render", [to_markdown, to_latex, to_json])
def test_smoke_is_in_the_caption_of_every_form_and_not_in_that_of_paper(render):
    assert "SMOKE" in render(build(ROWS, "smoke"))
    assert "SMOKE" not in render(build(ROWS, "paper")).replace("mini", "")


@pytest.mark.parametrize("report", [table3, table5])
def test_open_is_in_the_caption_and_no_published_value_beside_its_cells(report: Any):
    shown = report.build([row("lora_r8", 0, 0.85, **TUNED)], "open", PUBLISHED)
    assert "OPEN" in shown.caption and "never to be set against" in shown.caption
    assert not {"Published", "Verdict", "Comparable"} & set(shown.columns)
    assert not any("published" in line.evidence for line in shown.lines)


@pytest.mark.parametrize("report", [table3, table5])
def test_weights_that_were_decoded_are_marked_where_nothing_quantizes_them(report: Any):
    rows = [
        row("lora_r8", 0, 0.8, quantizer=quantizer, decoded_from="Q4_1")
        for quantizer in ("none", "nf4")
    ]
    shown = report.build(rows, "open")
    at = shown.columns.index("Quantizer")
    texts = [line.texts[at] for line in shown.lines if line.texts[at]]
    assert texts == ["none (Q4_1, decoded)", "nf4"]
    (note,) = (note for note in shown.notes if "Q4_1" in note)
    assert note.startswith("gpt2_127m_mini: its linear weights come as Q4_1.")
    assert "decoded" not in to_markdown(build([row("lora_r8", 0, 0.8)], "smoke"))


def test_smoke_is_in_the_terminal_too():
    assert "SMOKE" in str(to_rich(build(ROWS, "smoke")).title)


def test_a_single_seed_is_marked():
    assert any("single seed" in note for note in build(ROWS, "smoke").notes)
    assert not any("single seed" in note for note in build(ROWS[1:4], "smoke").notes)


def test_a_table_of_nothing_but_reasons_still_prints():
    table = build(
        [row(name, state="skipped", reason="no weights") for name in ("full", "lora_r8")], "paper"
    )
    assert len(table.lines) == 1 and "no weights" in "\n".join(table.notes)
    assert to_markdown(table) and to_latex(table) and to_rich(table).row_count == 1


def test_a_table_of_no_cells_prints_its_head():
    assert to_markdown(build([], "smoke")).count("|") > len(COLUMNS) - 3


def test_the_json_has_run_ids_and_unrounded_values():
    table = json.loads(to_json(build(ROWS, "smoke")))
    cells = [cell for line in table["lines"] for cell in line["evidence"].get("cells", [])]
    assert {cell["run_id"] for cell in cells} == {row["run_id"] for row in ROWS}
    values = [
        score["value"]
        for cell in cells
        for score in cell["scores"]
        if score["metric"] == "f1_weighted"
    ]
    assert 0.78 - 0.01 in values


def test_equal_rows_give_equal_bytes_and_other_rows_others():
    for render in (to_markdown, to_latex, to_json):
        assert render(build(ROWS, "smoke")) == render(build(json.loads(json.dumps(ROWS)), "smoke"))
        assert render(build(ROWS, "smoke")) != render(
            build([row("full", 0, 0.781), *ROWS[1:]], "smoke")
        )


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
    assert {line.replace(r"\&", "").count("&") for line in body} == {
        len(build(ROWS, "smoke").columns) - 1
    }
    assert text.count(r"\midrule") == 3  # head, second task, without result
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    assert r"\label{tab:table3_smoke}" in text and r"x\_1 \& y" in text


def test_no_note_stands_where_tex_would_read_its_beginning_as_an_option():
    table = Table(
        "table3", "x", "Caption", ("a",), (Line(("1",)),), ("first", "[1] source", "* stale")
    )
    after = [text.lstrip()[:1] for text in to_latex(table).split(r"\\")[1:]]
    assert after and not set(after) & {"[", "*"}


def test_markdown_keeps_its_columns_whatever_a_text_holds():
    table = Table("table3", "x", "Caption", ("a", "b"), (Line(("1|2", "3\n4")),), ("note | x",))
    body = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    assert len(body) == 3
    assert [line.replace("\\|", "").count("|") for line in body] == [3, 3, 3]


def test_the_terminal_table_takes_square_brackets_as_text():
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    Console(file=out, width=250).print(to_rich(build(ROWS, "smoke")))
    assert "0.780 [0.76, 0.80]" in out.getvalue() and "needs 41.2 GiB" in out.getvalue()


# Table 5


def test_costs_stand_in_one_line_a_configuration_with_their_units():
    rows = [
        row("lora_r8", seed, 0.7, batch=batch, devices=2) for batch in (4, 8) for seed in (0, 1)
    ]
    rows = [r | {"run_id": str(i)} for i, r in enumerate(rows)]
    table = table5.build(rows, "smoke")
    assert [line.texts for line in table.lines] == [
        (
            "gpt2_127m_mini",
            "none",
            "lora_r8",
            str(batch),
            "2",
            "24,576",
            "0.002898",
            "0.10",
            "1.50",
            "5,432",
            "12.5",
            "96.2 %",
        )
        for batch in (4, 8)
    ]
    assert "SMOKE" in table.caption and len(cells(table)) == 4


def test_at_paper_scale_what_has_not_run_shows_the_sizes_that_need_no_run():
    known = {
        "total_params": 8_030_261_248,
        "trainable_params": 20_971_520,
        "base_bytes": 5_702_000_000,
        "trained_file_bytes": 83_886_080,
    }
    skipped = [
        row(
            "lora_r8",
            state="skipped",
            reason="no weights",
            batch=batch,
            run_id=f"{batch:012d}",
            sizes=known,
        )
        for batch in (4, 8)
    ]
    table = table5.build(skipped, "paper")
    (computed, gathered) = ([*line.texts] for line in table.lines)
    texts = dict(zip(table.columns, computed, strict=True))
    assert (texts["Trainable"], texts["Base [GB]"], texts["Adapter file [MB]"]) == (
        "20,971,520",
        "5.702",
        "83.89",
    )
    assert texts["Peak memory [GiB]"] == texts["Tokens/s"] == "-" and "4, 8" in computed
    assert "2 cells - skipped" in gathered
    assert any(note.startswith("Computed, not run") for note in table.notes)
    assert len(table5.build(skipped, "smoke").lines) == 1, "a miniature's are measured"


def test_a_run_that_two_tables_share_counts_once_and_cells_without_costs_are_gathered():
    rows = [
        *ROWS,
        row("full", 0, 0.78),
        row("nothing", state="skipped", reason="no weights"),
        row("more", state="skipped", reason="no weights"),
    ]
    table = table5.build(rows, "paper")
    assert sorted(cells(table)) == sorted({r["label"] for r in rows})
    assert [line.texts[:6] for line in table.lines][-1] == (
        "gpt2_127m_mini",
        "none",
        "nothing, more",
        "32",
        "1",
        "2 cells - skipped",
    )
    assert any("no weights" in note for note in table.notes)
    for render in (to_markdown, to_latex, to_json):
        assert render(table) == render(table5.build(json.loads(json.dumps(rows)), "paper"))


def test_published_memory_stands_beside_paper_cells_of_the_same_batch_with_its_defects():
    named = {
        "model": "llama3_1_8b_instruct",
        "train_on": "fin_ner",
        "tasks": [],
        "costs": COSTS,
        "state": "done",
        "weights": "random",
    }
    table = table5.build(
        [row("lora_r8", batch=4, **named), row("lora_r8", 1, batch=16, **named)], "paper", PUBLISHED
    )
    assert [line.texts[-2:] for line in table.lines] == [
        ("peak 30.91, finlora_memory [1]", "with reservations"),
        ("", ""),
    ]
    text = reasons_of(table, "[1] ")
    for said in (
        "a peak cannot be",
        "not stated",
        "of 2^30 bytes is not said",
        "entities are generated",
        "on q, k and v only",
    ):
        assert said in text, said
    others = [note for note in table.notes if note.startswith("Published, in the JSON only")]
    assert ["trainable" in note for note in others] == [True, False] and "size" in others[1]
    assert {each["value"] for each in table.lines[0].evidence["published"]} == {
        30.91,
        4.72e6,
        16.08,
    }
    assert "30.91" not in to_json(
        table5.build([row("lora_r8", batch=4, **named)], "smoke", PUBLISHED)
    )
    two = table5.build([row("lora_r8", batch=8, devices=2, **named)], "paper", PUBLISHED)
    assert two.lines[0].texts[-2].startswith("peak 30.91")  # four a device


def test_the_titles_of_the_columns_are_told_apart():
    assert len(set(TITLES.values())) == len(COLUMNS)


# The figure


def test_every_scored_configuration_is_a_dot_with_its_interval_above_the_constant_answer():
    (panel,) = panels(ROWS)
    assert (panel.title, panel.constant) == ("tfns", 0.656)
    assert [dot.group for dot in panel.dots] == ["full", "lora_r8", "rosa"], "vera is short"
    assert [dot.weak for dot in panel.dots] == [
        False
    ] * 3 and "; short cells (1) are in the table" in panel.axis
    (brief,) = panels([{**each, "short": True} for each in ROWS])
    assert [dot.weak for dot in brief.dots] == [True] * 4 and "hollow" in brief.axis
    assert (panel.dots[0].value, panel.dots[0].low) == (pytest.approx(0.78), pytest.approx(0.76))
    assert panels([row("full", 0, 0.7, weights="random"), row("lora_r8", state="skipped")]) == ()


def test_equal_dots_give_equal_pictures_and_other_dots_others():
    one = to_svg(draw(panels(ROWS), "Table 3"))
    assert one == to_svg(draw(panels(json.loads(json.dumps(ROWS))), "Table 3")) and one.startswith(
        "<?xml"
    )
    assert one != to_svg(draw(panels([row("full", 0, 0.781), *ROWS[1:]]), "Table 3"))
    assert to_png(draw(panels(ROWS), "Table 3"))[:4] == b"\x89PNG"
    assert "<svg" in to_svg(draw((), "Table 3"))


def test_where_an_adapter_from_elsewhere_was_trained_is_not_made_up():
    made = row("their_folder", 0, 0.7, adapter_kind="peft_folder")
    assert lines([made])["their_folder"]["Trained on"] == "elsewhere"
    assert lines([made, row("lora_r8", 0, 0.7)])["lora_r8"]["Trained on"] == ""


def test_a_bound_has_the_decimals_that_its_resamples_carry():
    assert bounds(-0.003, 0.0004, "+") == "[-0.003, +0.000]"
    assert bounds(0.7345, 0.7679) == "[0.73, 0.77]"
    generator = np.random.default_rng(0)
    lows = [
        np.quantile(generator.normal(0, THIRD_DECIMAL_BELOW / 3.92, 1000), 0.025)
        for _ in range(400)
    ]
    assert np.std(lows) == pytest.approx(THIRD_DECIMAL_BELOW / 45, rel=0.15)


def test_the_notes_say_what_is_resampled_and_what_an_interval_leaves_out():
    notes = " ".join(build(ROWS, "smoke").notes)
    assert "sentences, not its documents" in notes and "on another CPU" in notes


@pytest.mark.parametrize("name", ["$\\frac$", "a$b", "$x^2$", "100 %", "a\\b"])
def test_a_name_is_drawn_as_it_is_written_and_not_as_mathematics(name: str) -> None:
    dot = Dot(name, name, 0.5, 0.4, 0.6, weak=False)
    figure = draw([Panel(name, "accuracy", None, (dot,))], name)
    assert to_svg(figure).startswith("<?xml")
    chart = Chart(name, "x", "y", (Curve(name, (0.0, 1.0), (0.0, 1.0), labels=(name,)),))
    figure = draw_charts([chart], name)
    assert to_svg(figure).startswith("<?xml")
    from matplotlib import cbook

    assert not cbook.is_math_text(as_written(name))
