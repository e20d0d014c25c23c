"""Table 3: the quality of every model x adapter x quantizer on the financial tasks."""

from collections.abc import Sequence
from statistics import mean, stdev

from finrepro.catalogue.published import Published
from finrepro.reporting.beside import Beside, published_evidence
from finrepro.reporting.cell_result import CellResult
from finrepro.reporting.dots import Dot, Panel
from finrepro.reporting.grouping import (
    SHORT_NOTE,
    axis,
    caption,
    decoded_notes,
    evidence,
    grouped,
    marks,
    quantizer_text,
    reasons,
)
from finrepro.reporting.scores import bounds, estimate_of, metrics_of, score_of
from finrepro.reporting.table import Line, Table, without_columns

TITLES = {
    "task": "Task",
    "model": "Model",
    "quantizer": "Quantizer",
    "adapter": "Adapter",
    "trained_on": "Trained on",
    "score": "Score [95 %]",
    "further": "Further",
    "over_constant": "Over constant",
    "published": "Published",
    "verdict": "Verdict",
    "n": "n",
    "seeds": "Seeds",
}
COLUMNS = tuple(TITLES)
LINE = ("model", "quantizer", "adapter", "train_on", "batch", "devices")


def build(rows: Sequence[CellResult], scale: str, published: Sequence[Published] = ()) -> Table:
    """One line a (task, configuration), seeds averaged; the best constant answer heads each task.
    Cells without a result come last, a line a reason.

    `published` values stand beside cells at paper scale only.
    """
    judged = [row for row in rows if row["tasks"]]  # a cell without tasks only measures costs
    beside = Beside(published if scale == "paper" else ())
    lines: list[Line] = []
    tasks = dict.fromkeys(task for row in judged for task in row["tasks"])
    for task in tasks:
        of_task = [
            row
            for row in judged
            if task in row["tasks"] and row["state"] in ("done", "stale", "failed", "diverged")
        ]
        head = _constant(task, of_task)
        lines += [head] if head else []
        for _, of_line in grouped(of_task, *LINE):
            lines.append(_line(task, of_line, _names(task, of_line[0], of_task), beside))
    lines += _without_result(
        [row for row in judged if row["state"] in ("skipped", "refused", "not run", "damaged")]
    )
    table = Table(
        name="table3",
        label=f"table3_{scale}",
        caption=caption("Financial tasks", scale),
        columns=tuple(TITLES.values()),
        lines=tuple(lines),
        notes=_notes(judged, beside),
    )
    empty = {"published": {""}, "verdict": {""}, "trained_on": {"", "-"}}
    return without_columns(
        table,
        {
            index
            for index, column in enumerate(COLUMNS)
            if column in empty and {line.texts[index] for line in lines} <= empty[column]
        },
    )


def panels(rows: Sequence[CellResult]) -> tuple[Panel, ...]:
    """The table's scores for finrepro.reporting.dots: a panel a task, a dot a configuration,
    coloured by adapter.

    Short cells show that a path works: they are drawn only where no other cell shows a quality.
    """
    panel_list = []
    for task in dict.fromkeys(task for row in rows for task in row["tasks"]):
        of_task = [row for row in rows if task in row["tasks"]]
        main = next(iter(metrics_of(of_task, task)), "")
        dots, constant = [], None
        for _, group in grouped(of_task, *LINE):
            scores = [score for row in group if (score := score_of(row, task, main))]
            if not scores:
                continue
            ours, names = estimate_of(scores), _names(task, group[0], of_task)
            constant = scores[0].get("constant")
            source = f", {names['trained_on']}" if len(names["trained_on"]) > 1 else ""
            name = f"{names['model']}, {names['quantizer']}, {names['adapter']}{source}"
            dots.append(
                Dot(name, group[0]["adapter"], ours.value, ours.low, ours.high, group[0]["short"])
            )
        drawn = [dot for dot in dots if not dot.weak] or dots
        if drawn:
            label = f"{main.replace('_', ' ')} [95 %]; dashed: best constant answer"
            if len(drawn) < len(dots):
                label += f"; short cells ({len(dots) - len(drawn)}) are in the table"
            elif drawn[0].weak:
                label += "; hollow: trained too briefly to show quality"
            panel_list.append(Panel(task, label, constant, tuple(drawn)))
    return tuple(panel_list)


def _texts(**by_column: str) -> tuple[str, ...]:
    """A line's texts in the order of the columns."""
    return tuple(by_column.pop(column, "") for column in TITLES)


def _further(scores: Sequence[float | None]) -> str:
    return " / ".join("-" if score is None else f"{score:.3f}" for score in scores)


def _constant(task: str, rows: Sequence[CellResult]) -> Line | None:
    """The line of the best constant answer, from any scored cell of the task."""
    metrics = metrics_of(rows, task)
    scored = next((row for row in rows if metrics and score_of(row, task, metrics[0])), None)
    if scored is None:
        return None
    main, *further = (score_of(scored, task, metric) for metric in metrics)
    if main is None or main.get("constant") is None:
        return None
    texts = _texts(
        task=task,
        model=f"always {main['constant_answer']}",
        score=f"{main['constant']:.3f}",
        further=_further([score["constant"] if score else None for score in further]),
        n=str(main["n"]),
    )
    return Line(texts, section=task)


def _names(task: str, row: CellResult, rows: Sequence[CellResult]) -> dict[str, str]:
    """The columns that name the line; devices and batch only where they differ."""
    same = [r for r in rows if all(axis(r, name) == axis(row, name) for name in LINE[:4])]
    adapter = row["adapter"] + (
        f" (batch {row['batch']})" if len({r["batch"] for r in same}) > 1 else ""
    )
    adapter += f" ({row['devices']} devices)" if row["devices"] > 1 else ""
    elsewhere = {"base": "-", "peft_folder": "elsewhere"}.get(row["adapter_kind"])
    trained_on = elsewhere or ("" if row["train_on"] == task else row["train_on"])
    return {
        "task": task,
        "model": row["model"],
        "quantizer": quantizer_text(row),
        "adapter": adapter,
        "trained_on": trained_on,
    }


def _line(task: str, rows: Sequence[CellResult], names: dict[str, str], beside: Beside) -> Line:
    """The line of one configuration over its seeds."""
    metrics = metrics_of(rows, task)
    scored = [row for row in rows if metrics and score_of(row, task, metrics[0])]
    cells = evidence(rows, task)
    if not scored:
        finished = rows[0]["state"] in ("done", "stale")
        why = "random weights" if rows[0]["weights"] == "random" and finished else rows[0]["state"]
        return Line(_texts(**names, score=f"- ({why})", further=_costs(rows[0])), task, cells)
    by_metric = {
        metric: [s for row in scored if (s := score_of(row, task, metric))] for metric in metrics
    }
    ours = {metric: estimate_of(scores) for metric, scores in by_metric.items() if scores}
    main, scores = ours[metrics[0]], by_metric[metrics[0]]
    pairs = beside.find(scored[0], task, metrics, scores[0]["n"])
    value, verdict = beside.texts(pairs, ours)
    gains = [score for score in scores if score.get("gain") is not None]
    over = ""
    if gains:
        gain, low, high = (mean(s[key] for s in gains) for key in ("gain", "gain_low", "gain_high"))
        over = f"{gain:+.3f} {bounds(low, high, '+')}"
    seeds = (
        str(len(scored))
        if len(scored) == 1
        else f"{len(scored)} (sd {stdev(score['value'] for score in scores):.3f})"
    )
    texts = _texts(
        **names,
        score=f"{main.value:.3f} {bounds(main.low, main.high)}{marks(scored)}",
        further=_further([ours[m].value if m in ours else None for m in metrics[1:]]),
        over_constant=over,
        published=value,
        verdict=verdict,
        n=str(scores[0]["n"]),
        seeds=seeds,
    )
    return Line(texts, task, cells | (published_evidence(pairs) if pairs else {}))


def _costs(row: CellResult) -> str:
    """Peak memory and speed, where they were measured."""
    peak, speed = row["costs"].get("peak_memory_bytes"), row["costs"].get("tokens_per_second")
    texts = [f"{peak / 2**30:.2f} GiB" if peak else "", f"{speed:,.0f} tokens/s" if speed else ""]
    return ", ".join(filter(None, texts))


def _without_result(rows: Sequence[CellResult]) -> list[Line]:
    """A line a (model, state, reason): on a machine without weights that is thousands of cells."""
    lines = []
    for (model, state, _), group in grouped(rows, "model", "state", "reason"):
        tasks = dict.fromkeys(task for row in group for task in row["tasks"])
        names = {
            "task": _some(tasks, "tasks"),
            "quantizer": _some(dict.fromkeys(row["quantizer"] for row in group), "quantizers"),
            "adapter": _some(dict.fromkeys(row["adapter"] for row in group), "adapters"),
        }
        count = f"{len(group)} cells" if len(group) > 1 else ""
        texts = _texts(**names, model=model, score=f"- ({state})", further=count)
        lines.append(Line(texts, "without result", evidence(group)))
    return lines


def _some(names: dict[str, None], plural: str) -> str:
    """One or two names, or their number."""
    return ", ".join(names) if len(names) <= 2 else f"{len(names)} {plural}"


def _notes(rows: Sequence[CellResult], beside: Beside) -> tuple[str, ...]:
    """How to read the table, then the reasons."""
    notes = [
        "Task: the test split that is scored; trained on the task's own training split unless the "
        "table names another set. The first line of a task is its best constant answer.",
        "Score; further: classification - accuracy; weighted F1 / macro F1 / MCC. "
        "Entities - entity F1; precision / recall / unparsable share.",
        "Intervals: bootstrap over test examples, those of equal text resampled together (of FIN "
        "sentences, not its documents); over several seeds with the spread between runs "
        "(Student's t). Bounds have as many decimals as 1,000 resamples carry.",
        "Full fine-tuning amplifies rounding: on another CPU the same cell was up to 0.01 of "
        "accuracy away. Intervals over examples do not cover that; those over seeds do.",
    ]
    scored = [row for row in rows if row["scores"]]
    if any(len({row["seed"] for row in group}) == 1 for _, group in grouped(scored, *LINE)):
        notes.append("Seeds 1: a single seed says nothing about the spread between runs.")
    if any(row["short"] for row in rows):
        notes.append(SHORT_NOTE)
    if any(row["weights"] == "random" for row in rows):
        notes.append(
            "Random weights: memory and speed are measured truly; there is no quality to show."
        )
    notes += decoded_notes(rows)
    if beside.notes:
        notes.append(
            "Verdict: EQUIVALENT - the whole interval lies within the margin around the published "
            "value; DIFFERS - outside as a whole; INCONCLUSIVE - neither. Margin: fixed in "
            "configs/published before any run, two sampling half-widths of a published accuracy; "
            "an F1 has none."
        )
    return (*notes, *beside.below(), *reasons(rows))
