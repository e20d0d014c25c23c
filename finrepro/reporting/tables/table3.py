"""Table 3: the quality of every model x adapter x quantizer on the financial tasks."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from finrepro.catalogue.published import Published
from finrepro.reporting.beside import Beside, published_evidence
from finrepro.reporting.dots import Dot, Panel
from finrepro.reporting.grouping import Row, evidence, grouped, marks, reasons
from finrepro.reporting.table import Line, Table
from finrepro.statistics.equivalence import Estimate, estimate

# A family of tasks is known by its main metric, the first here that was scored; the others follow
# it in one column.
FAMILIES = {
    "accuracy": ("f1_weighted", "f1_macro", "mcc"),
    "f1_entity": ("precision_entity", "recall_entity", "unparsable_rate"),
}
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


def build(rows: Sequence[Row], scale: str, published: Sequence[Published] = ()) -> Table:
    """One line a (task, cell), seeds averaged; the best constant answer heads each task. What has
    no result comes last, gathered.

    `rows` are cells joined with their results. `published` values stand beside cells at paper scale
    only.
    """
    judged = [row for row in rows if row["tasks"]]  # a cell without tasks is there for its costs
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
        [row for row in judged if row["state"] in ("skipped", "refused", "not run")]
    )
    empty = {
        "published": ("",),
        "verdict": ("",),
        "trained_on": ("", "-"),
    }  # a column that says nothing is left out
    said = {column: {line.texts[i] for line in lines} for i, column in enumerate(COLUMNS)}
    kept = [
        i
        for i, column in enumerate(COLUMNS)
        if column not in empty or said[column] - set(empty[column])
    ]
    smoke = (
        " - SMOKE: miniatures, never to be set against published values" if scale == "smoke" else ""
    )
    return Table(
        name="table3",
        label=f"table3_{scale}",
        caption="Financial tasks" + smoke,
        columns=tuple(TITLES[COLUMNS[i]] for i in kept),
        lines=tuple(
            Line(tuple(line.texts[i] for i in kept), line.section, line.evidence) for line in lines
        ),
        notes=_notes(judged, beside),
    )


def panels(rows: Sequence[Row]) -> tuple[Panel, ...]:
    """The scored part of the table for finrepro.reporting.dots: a panel a task, a dot a
    configuration, coloured by adapter.

    Short cells show that a path works, and are left to the table wherever others show a quality.
    """
    found = []
    for task in dict.fromkeys(task for row in rows for task in row["tasks"]):
        of_task = [row for row in rows if task in row["tasks"]]
        main = next(iter(_metrics(of_task, task)), "")
        dots, constant = [], None
        for _, group in grouped(of_task, *LINE):
            scores = [score for row in group if (score := _score(row, task, main))]
            if not scores:
                continue
            ours, names = _estimate(scores), _names(task, group[0], of_task)
            constant = scores[0].get("constant")
            source = f", {names['trained_on']}" if len(names["trained_on"]) > 1 else ""
            name = f"{names['model']}, {names['quantizer']}, {names['adapter']}{source}"
            dots.append(
                Dot(name, group[0]["adapter"], ours.value, ours.low, ours.high, group[0]["short"])
            )
        shown = [dot for dot in dots if not dot.weak] or dots
        if shown:
            told = "hollow: trained too briefly to show quality" if shown[0].weak else ""
            told = (
                f"short cells ({len(dots) - len(shown)}) are in the table"
                if len(shown) < len(dots)
                else told
            )
            axis = f"{main.replace('_', ' ')} [95 %]; dashed: best constant answer{'; ' * bool(told)}{told}"
            found.append(Panel(task, axis, constant, tuple(shown)))
    return tuple(found)


def _texts(**by_column: str) -> tuple[str, ...]:
    """A line's texts in the order of the columns."""
    return tuple(by_column.pop(column, "") for column in TITLES)


def _score(row: Row, task: str, metric: str) -> dict[str, Any] | None:
    """The row's score for a task and a metric, None without one. Random weights have no quality,
    whatever was computed.
    """
    if row["weights"] == "random":
        return None
    return next((s for s in row["scores"] if s["metric"] == metric and s["task"] == task), None)


def _metrics(rows: Sequence[Row], task: str) -> tuple[str, ...]:
    """The task's metrics, the main one first: those of its family, or, for a family of its own,
    what was scored first.
    """
    scored = dict.fromkeys(s["metric"] for row in rows for s in row["scores"] if s["task"] == task)
    for main, others in FAMILIES.items():
        if main in scored:
            return (main, *others)
    return tuple(scored)[:1]


def _further(scores: Sequence[float | None]) -> str:
    return " / ".join("-" if score is None else f"{score:.3f}" for score in scores)


def _constant(task: str, rows: Sequence[Row]) -> Line | None:
    """The line of the best constant answer, taken from any scored cell of the task."""
    metrics = _metrics(rows, task)
    scored = next((row for row in rows if metrics and _score(row, task, metrics[0])), None)
    if scored is None:
        return None
    main, *others = (_score(scored, task, metric) for metric in metrics)
    if main is None or main.get("constant") is None:
        return None
    further = _further([other["constant"] if other else None for other in others])
    texts = _texts(
        task=task,
        model=f"always {main['constant_answer']}",
        score=f"{main['constant']:.3f}",
        further=further,
        n=str(main["n"]),
    )
    return Line(texts, section=task)


def _names(task: str, row: Row, rows: Sequence[Row]) -> dict[str, str]:
    """What names the line; devices and batch only where they say something."""
    same = [r for r in rows if all(r[axis] == row[axis] for axis in LINE[:4])]
    adapter = row["adapter"] + (
        f" (batch {row['batch']})" if len({r["batch"] for r in same}) > 1 else ""
    )
    adapter += f" ({row['devices']} devices)" if row["devices"] > 1 else ""
    elsewhere = {"base": "-", "peft_folder": "elsewhere"}.get(row["adapter_kind"])
    trained_on = elsewhere or ("" if row["train_on"] == task else row["train_on"])
    return {
        "task": task,
        "model": row["model"],
        "quantizer": row["quantizer"],
        "adapter": adapter,
        "trained_on": trained_on,
    }


def _line(task: str, rows: Sequence[Row], names: dict[str, str], beside: Beside) -> Line:
    """The line of one configuration over its seeds."""
    metrics = _metrics(rows, task)
    scored = [row for row in rows if metrics and _score(row, task, metrics[0])]
    shown = evidence(rows, task)
    if not scored:
        finished = rows[0]["state"] in ("done", "stale")
        why = "random weights" if rows[0]["weights"] == "random" and finished else rows[0]["state"]
        return Line(_texts(**names, score=f"- ({why})", further=_costs(rows[0])), task, shown)
    found = {
        metric: [s for row in scored if (s := _score(row, task, metric))] for metric in metrics
    }
    ours = {metric: _estimate(scores) for metric, scores in found.items() if scores}
    main, n = ours[metrics[0]], found[metrics[0]][0]["n"]
    pairs = beside.find(scored[0], task, metrics, n)
    value, verdict = beside.texts(pairs, ours)
    gains = [s for s in found[metrics[0]] if s.get("gain") is not None]
    over = (
        "{:+.3f} [{:+.3f}, {:+.3f}]".format(
            *(mean(s[key] for s in gains) for key in ("gain", "gain_low", "gain_high"))
        )
        if gains
        else ""
    )
    seeds = (
        str(len(scored))
        if len(scored) == 1
        else f"{len(scored)} (sd {stdev(s['value'] for s in found[metrics[0]]):.3f})"
    )
    texts = _texts(
        **names,
        score=f"{main.value:.3f} [{main.low:.3f}, {main.high:.3f}]{marks(scored)}",
        further=_further([ours[m].value if m in ours else None for m in metrics[1:]]),
        over_constant=over,
        published=value,
        verdict=verdict,
        n=str(n),
        seeds=seeds,
    )
    return Line(texts, task, shown | (published_evidence(pairs) if pairs else {}))


def _estimate(scores: Sequence[dict[str, Any]]) -> Estimate:
    """Seeds as one estimate."""
    values, lows, highs = ([score[key] for score in scores] for key in ("value", "low", "high"))
    return estimate(values, lows, highs, scores[0]["n"])


def _costs(row: Row) -> str:
    """What a cell without quality has measured all the same."""
    peak, speed = row["costs"].get("peak_memory_bytes"), row["costs"].get("tokens_per_second")
    return ", ".join(
        [
            *([f"{peak / 2**30:.2f} GiB"] if peak else []),
            *([f"{speed:,.0f} tokens/s"] if speed else []),
        ]
    )


def _without_result(rows: Sequence[Row]) -> list[Line]:
    """A line a (model, state, reason): a machine without weights would otherwise fill pages with
    nothing.
    """
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


def _some(names: dict[str, None], what: str) -> str:
    """One or two names, or how many there are."""
    return ", ".join(names) if len(names) <= 2 else f"{len(names)} {what}"


def _notes(rows: Sequence[Row], beside: Beside) -> tuple[str, ...]:
    """How to read the table, then every reason."""
    notes = [
        "Task: the test split that is scored; trained on the task's own training split unless the table names another set. "
        "The first line of a task is its best constant answer.",
        "Score; further: classification - accuracy; weighted F1 / macro F1 / MCC. "
        "Entities - entity F1; precision / recall / unparsable share.",
        "Intervals: bootstrap over test examples, what shares a source resampled together; over several seeds "
        "with the spread between runs (Student's t).",
    ]
    scored = [row for row in rows if row["scores"]]
    if any(len({row["seed"] for row in group}) == 1 for _, group in grouped(scored, *LINE)):
        notes.append("Seeds 1: a single seed says nothing about the spread between runs.")
    if any(row["short"] for row in rows):
        notes.append(
            "(short): trained for too few steps to show quality; the cell proves that its path works."
        )
    if any(row["weights"] == "random" for row in rows):
        notes.append(
            "Random weights: memory and speed are measured truly; there is no quality to show."
        )
    if beside.notes:
        notes.append(
            "Verdict: EQUIVALENT - the whole interval lies within the margin around the published value; DIFFERS - outside as a whole; "
            "INCONCLUSIVE - neither. Margin: fixed in configs/published before any run, "
            "two sampling half-widths of a published accuracy; an F1 has none."
        )
    return (*notes, *beside.below(), *reasons(rows))
