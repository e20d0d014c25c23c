"""Texts that MLflow shows: the note of a cell, and a table as a page."""

import html
from pathlib import Path
from typing import Any

# By scale, where the cells are not of the paper's models.
SCALE_NOTES = {
    "smoke": "**SMOKE: a miniature, never to be set against published values.**",
    "open": "**OPEN: a small open model, not one of the paper's; never to be set against "
    "published values.**",
}
NOTE_LIMIT = 7900  # MLflow cuts a tag at 8,000 characters, without a word
STYLE = (
    "body{font:13px sans-serif}table{border-collapse:collapse}"
    "td,th{padding:3px 9px;text-align:left;border-bottom:1px solid #ddd}"
)


def cell_note(result: dict[str, Any], folder: Path) -> str:
    """What a reviewer reads first in a run: the scores with their intervals, or why there are
    none.
    """
    scale = result["cell"]["scale"]
    head = [SCALE_NOTES[scale]] if scale in SCALE_NOTES else []
    if result["status"] != "done":
        head.append(f"**{result['status']}**: {result['reason']}")
    paragraphs = [*head, *([_scores(result["scores"])] if result["scores"] else [])]
    evidence = f"Evidence: results/runs/{folder.name}/ (`sha256sum -c manifest.sha256`)"
    return cut("\n\n".join([*paragraphs, evidence]), evidence)


def _scores(scores: list[dict[str, Any]]) -> str:
    """The scores as a Markdown table."""
    rows = [
        f"| {s['task']} | {s['metric']} | {s['value']:.4f} [{s['low']:.4f}, {s['high']:.4f}] | "
        f"{'' if s['constant'] is None else format(s['constant'], '.4f')} |"
        for s in scores
    ]
    head = ["| task | metric | value [95 % interval] | best constant |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def cut(text: str, last: str) -> str:
    """A note short enough for MLflow: one that is too long loses lines at its end, and ends with
    `last` instead.
    """
    if len(text) <= NOTE_LIMIT:
        return text
    end = text.rfind("\n", 0, NOTE_LIMIT - len(last) - 20)
    return f"{text[:end]}\n\n(cut) {last}"


def table_html(table: dict[str, Any]) -> str:
    """A table's JSON as a page that MLflow shows: every row with the run ids behind it."""

    def row(texts: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    def runs(line: dict[str, Any]) -> str:
        return " ".join(
            cell["run_id"] for cell in line["evidence"].get("cells", []) if cell.get("run_id")
        )

    body, previous = [], None
    for line in table["lines"]:
        if previous is not None and line["section"] != previous:
            body.append(row([""] * (len(table["columns"]) + 1), "td"))
        previous = line["section"]
        body.append(row([*line["texts"], runs(line)], "td"))
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table["notes"])
    return (
        f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>"
        f"<h3>{html.escape(table['caption'])}</h3>"
        f"<table>{row([*table['columns'], 'Runs'], 'th')}{''.join(body)}</table>{notes}\n"
    )
