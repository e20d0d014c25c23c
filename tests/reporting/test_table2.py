"""Law: pretraining is compared at equal tokens, at equal time and at equal parameters, and every
column says what was measured.
"""

import math
from typing import Any

import pytest

from finrepro.catalogue.cells import expand
from finrepro.catalogue.reader import model
from finrepro.catalogue.selection import Selection
from finrepro.reporting.curves import draw_charts
from finrepro.reporting.dots import to_svg
from finrepro.reporting.loss_curve import WINDOW, loss_curve
from finrepro.reporting.pretraining import facts
from finrepro.reporting.tables.table2 import build, charts, equal_time

DENSE, SMALL = "gpt2_1_5b_deep_mini", "gpt2_1_5b_deep_mini_equal"
STEPS = 40
LOSS = "Loss (seeds)"


def row(
    name: str = DENSE,
    seed: int = 0,
    perplexity: float | None = 20.0,
    speed: float = 1000.0,
    **changes: Any,
) -> dict[str, Any]:
    """A finished cell whose loss falls by 0.01 a step, each of which takes 1000 / speed seconds."""
    tokens, reference = 1000 * STEPS, model(name).compared_with or name
    scores = [
        {
            "task": task,
            "metric": metric,
            "value": value,
            "low": value - 1,
            "high": value + 1,
            "n": 60,
        }
        for task, more in (("text", 0), ("text.int8", 1), ("text.nf4", 3))
        for metric, value in (("perplexity", (perplexity or 0) + more), ("bits_per_byte", 1.5))
    ]
    costs = {
        "train_tokens": tokens,
        "train_seconds": tokens / speed,
        "tokens_per_second": speed,
        "step_seconds": 1000 / speed,
        "peak_memory_bytes": 2**30,
        "matmul_flops": 1e9,
    }
    done = perplexity is not None
    label = f"{name}-none-full-text-adamw-s{seed}"
    facts = {
        "parameters": model(name).parameters,
        "reference": reference,
        "rank": None,
        "flop_bound": 2.0,
        "compression": model(reference).parameters / model(name).parameters,
        "stored_bytes": {"none": 4_000_000, "int8": 2_000_000, "nf4": 1_000_000},
        "flops_per_token": {"palm": 5e5, "causal": 4e5},
        "scored_on": ["a corpus"],
    }
    steps = [
        {"step": i, "loss": 5 - 0.01 * i, "seconds": (i + 1) * 1000 / speed} for i in range(STEPS)
    ]
    return {
        "label": label,
        "run_id": label,
        "model": name,
        "quantizer": "none",
        "adapter": "full",
        "adapter_kind": "full",
        "train_on": "text",
        "optimizer": "adamw",
        "seed": seed,
        "tasks": ["text"],
        "devices": 1,
        "batch": 4,
        "weights": "scratch",
        "decoded_from": None,
        "notes": [],
        "state": "done" if done else "skipped",
        "reason": "" if done else "no data",
        "short": False,
        "sizes": {},
        "scores": scores if done else [],
        "costs": costs if done else {},
        "pretraining": facts,
        "curve": steps if done else [],
        **changes,
    }


def shown(*rows: dict[str, Any]) -> list[dict[str, str]]:
    table = build(rows, "smoke")
    return [dict(zip(table.columns, line.texts, strict=True)) for line in table.lines]


def test_a_curve_is_the_mean_of_its_last_steps_and_is_read_between_two():
    steps = [{"loss": float(i), "seconds": 2.0 * (i + 1)} for i in range(WINDOW + 2)]
    found = loss_curve(steps, 100 * len(steps))
    first = (WINDOW - 1) / 2
    assert found.losses == pytest.approx((first, first + 1, first + 2))
    assert found.tokens == pytest.approx(tuple(100.0 * (WINDOW + i) for i in range(3)))
    assert found.at(2.0 * WINDOW) == first and found.at(2.0 * WINDOW + 1) == pytest.approx(
        first + 0.5
    )
    assert found.at(2.0 * WINDOW + 4) == first + 2
    assert found.at(2.0 * WINDOW - 1) is None and found.at(2.0 * WINDOW + 5) is None


def test_a_curve_of_too_few_steps_has_no_value():
    assert loss_curve([{"loss": 1.0, "seconds": 1.0}] * (WINDOW - 1), 9).at(1.0) is None
    assert loss_curve([], 0).losses == ()


def test_equal_time_is_the_fastest_lines_and_the_others_are_read_there():
    slow, fast = row(speed=1000.0), row(SMALL, speed=2000.0)
    assert equal_time([slow, fast]) == 20.0 and equal_time([slow]) is None
    lines = shown(slow, fast)
    # After 20 s the slow one has made 20 of its 40 steps, the fast one all: means over ten steps.
    assert [line["At equal time"] for line in lines] == [
        f"{5 - 0.01 * 14.5:.3f}",
        f"{5 - 0.01 * 34.5:.3f}",
    ]


def test_speed_is_held_against_the_dense_model_trained_plainly():
    lines = shown(row(speed=1000.0), row(SMALL, speed=2500.0), row(speed=800.0, optimizer="galore"))
    assert [line["Speed-up, bound"] for line in lines] == [
        "1.00x of 2.00x",
        "2.50x of 2.00x",
        "0.80x of 2.00x",
    ]
    assert shown(row(SMALL))[0]["Speed-up, bound"] == "- of 2.00x"


def test_losses_are_nats_with_an_interval_and_those_of_the_stored_model_stand_beside_them():
    line = shown(row(perplexity=20.0))[0]
    assert line[LOSS] == f"{math.log(20):.3f} [{math.log(19):.2f}, {math.log(21):.2f}] (1)"
    assert line["In int8 / nf4"] == f"{math.log(21 / 20):+.3f} / {math.log(23 / 20):+.3f}"
    assert line["Bits a byte"] == "1.500"


def test_the_notes_name_the_text_of_the_loss_and_how_it_is_scored():
    notes = " ".join(build([row(), row(SMALL)], "smoke").notes)
    assert "Scored on a corpus: every paragraph by itself" in notes and "strided" in notes
    (cell, *_) = expand(Selection("2"), "smoke")
    assert "15 articles of the test split" in facts(cell.spec)["scored_on"][0]


def test_seeds_are_averaged_and_their_spread_widens_the_interval():
    alone, together = (
        shown(row(perplexity=20.0))[0],
        shown(*(row(seed=i, perplexity=20.0 + i) for i in range(3)))[0],
    )
    widths = [
        float(h) - float(low)
        for low, h in (
            each[LOSS].split("[")[1].split("]")[0].split(", ") for each in (alone, together)
        )
    ]
    assert together[LOSS].endswith("(3)") and widths[1] > widths[0]
    assert float(together[LOSS].split(" ")[0]) == pytest.approx(
        sum(math.log(20 + i) for i in range(3)) / 3, abs=1e-3
    )


def test_mfu_is_a_share_of_what_the_device_reached_by_both_conventions():
    assert shown(row(speed=1000.0))[0]["MFU"] == "50 / 40 %"
    without = row()
    del without["costs"]["matmul_flops"]
    assert shown(without)[0]["MFU"] == "-"


def test_a_configuration_without_result_keeps_what_arithmetic_says_and_its_reason():
    table = build([row(), row(SMALL, perplexity=None)], "smoke")
    lines = [dict(zip(table.columns, line.texts, strict=True)) for line in table.lines]
    assert (
        lines[1]["Parameters"] == f"{model(SMALL).parameters:,}"
        and lines[1]["Speed-up, bound"] == "- (skipped)"
    )
    assert any("skipped: no data" in note or "no data" in note for note in table.notes)


def test_bytes_are_in_three_digits_and_absent_where_a_quantizer_cannot_hold_the_model():
    held = row()
    held["pretraining"] |= {"stored_bytes": {"none": 4_051_200, "int8": 1_234_567_890, "nf4": None}}
    assert shown(held)[0]["MB at 16 / 8 / 4 bit"] == "4.05 / 1,235 / -"


def test_the_arithmetic_of_every_cell_of_the_table_can_be_shown():
    """At both scales, without a run."""
    for scale in ("smoke", "paper"):
        cells = [
            cell
            for cell in expand(Selection("2", full=True, seeds=(0,)), scale)
            if not cell.refusal
        ]
        rows = [
            row(each.spec.model.name, perplexity=None) | {"pretraining": facts(each.spec)}
            for each in cells
        ]
        assert len(build(rows, scale).lines) == len({each["model"] for each in rows})


def test_smoke_is_named_and_a_table_of_no_cells_has_its_head():
    assert (
        "SMOKE" in build([row()], "smoke").caption
        and "SMOKE" not in build([row()], "paper").caption
    )
    assert build([], "smoke").lines == ()


def test_the_figure_has_the_loss_by_tokens_and_by_time():
    found = charts([row(), row(SMALL, speed=2000.0), row(perplexity=None, seed=5)])
    assert [chart.x for chart in found] == ["tokens", "seconds of training"]
    assert [each.name for each in found[0].curves] == [DENSE, SMALL]
    assert found[1].curves[1].x[-1] == 20.0
    picture = to_svg(draw_charts(found, "x"))
    assert picture == to_svg(draw_charts(found, "x")) != to_svg(draw_charts(found[:1], "x"))
