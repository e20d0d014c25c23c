"""The paper as a PDF: paper/*.tex with the tables of a store, typeset in a temporary folder by
pdflatex and bibtex.

The same sources, tables and LaTeX give the same bytes: dates and identifiers are fixed here and in
main.tex. results/paper/provenance.json holds the sha256 of every input.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from finrepro import PROJECT
from finrepro.catalogue.reader import scales, table, tables
from finrepro.catalogue.spec import Scale
from finrepro.errors import CellFailed, EnvironmentFault
from finrepro.evidence import files
from finrepro.reporting.grouping import SCALE_MARKS
from finrepro.reporting.table import escape

SOURCES = PROJECT / "paper"
PROGRAMS = ("pdflatex", "bibtex")
# Debian's, for IEEEtran and the PostScript fonts.
PACKAGES = "texlive-publishers texlive-fonts-recommended"
PASSES, SECONDS = 4, 120  # limits: passes over the sources, and the time of one program
PAGE = 40  # rows of a table that fit a page together with its caption and notes
SPARE, WIDTH = 8, 120  # lines of notes below a full page of rows, and characters in such a line
NOTES = r"\par\smallskip\raggedright\footnotesize "  # how finrepro.reporting.table begins them
# Generated files that main.tex includes, and the scale of their tables.
GENERATED: dict[str, Scale] = {"tables": "paper", "open": "open", "appendix": "smoke"}
# An error as -file-line-error prints it.
_PLACED = re.compile(r"^(\S+?\.\w+):(\d+): (.+)$", re.MULTILINE)
_BARE = re.compile(r"^! (.+)$", re.MULTILINE)
_ABSENT = re.compile(r"File `([^']+)' not found|Font \S+ .*not loadable: Metric \(TFM\) file")
_LOOSE = re.compile(
    r"LaTeX Warning: ((?:Citation|Reference|Label) `[^']+').*?(undefined|multiply defined)"
)


def build(root: Path, output: Path | None = None) -> Path:
    """Typeset the paper with the tables under `root`/results/tables; the PDF's path, by default
    `root`/results/paper/main.pdf.

    Raises `EnvironmentFault` where LaTeX, or a part of it, is not installed, and `CellFailed` with
    LaTeX's first complaint; the log stays beside the PDF. A PDF that an earlier call made stays
    until the new one is whole.
    """
    goal = output or root / "results" / "paper" / "main.pdf"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise _not_installed(root, ", ".join(missing))
    if not (SOURCES / "main.tex").is_file():
        raise EnvironmentFault(
            f"the paper's sources are not here ({SOURCES}/main.tex): "
            "build it from a clone of the repository."
        )
    with files.disk_errors(root), tempfile.TemporaryDirectory(prefix="finrepro-paper-") as name:
        folder = Path(name)
        inputs = {}
        for path in sorted([*SOURCES.glob("*.tex"), *SOURCES.glob("*.bib")]):
            inputs[f"paper/{path.name}"] = _copy(path, folder / path.name)
        (folder / "generated").mkdir()
        for file_name, scale in GENERATED.items():
            text, included = results(root, scale, folder / "generated")
            (folder / "generated" / f"{file_name}.tex").write_text(text, encoding="utf-8")
            inputs |= included
        goal.parent.mkdir(parents=True, exist_ok=True)
        log = _typeset(folder, goal.with_suffix(".log"))
        _check(log, goal.with_suffix(".log"), root)
        pdf = (folder / "main.pdf").read_bytes()
        files.write_bytes(goal, pdf)
        latex = log.partition("\n")[0].partition(" (preloaded")[0]
        inputs = dict(sorted(inputs.items()))
        provenance = {"pdf_sha256": _sha256(pdf), "latex": latex, "inputs": inputs}
        files.write_json(goal.with_name("provenance.json"), provenance)
    return goal


def results(root: Path, scale: Scale, generated: Path) -> tuple[str, dict[str, str]]:
    """The tables of one scale as LaTeX, and the sha256 of the store's files in them; their figures
    are copied to `generated`.
    """
    blocks, digests = ["% Written by finrepro.reporting.paper; do not edit."], {}
    for name in tables():
        stem = table(name).report
        if scale not in (scales(name) or ("paper",)):
            continue  # a table that is computed is one of the paper's models alone
        folder = root / "results" / "tables" / scale
        # `--full` writes files of its own: the same table with more cells and seeds.
        candidates = (folder / f"{stem}-full.tex", folder / f"{stem}.tex")
        sources = [path for path in candidates if path.is_file()]
        if len(sources) == 2 and b"(not run)" in sources[0].read_bytes():
            sources.reverse()  # `--full --only` has run a few of its cells
        if not sources:
            blocks.append(_boxed(name.removeprefix("table"), scale))
            continue
        source = sources[0]
        content = source.read_bytes()
        digests[f"results/tables/{scale}/{source.name}"] = _sha256(content)
        blocks += [f"% {scale}/{source.name} sha256 {_sha256(content)}", split(content.decode())]
        picture = source.with_suffix(".png")
        if picture.is_file():
            digest = _copy(picture, generated / f"{stem}_{scale}.png")
            digests[f"results/tables/{scale}/{picture.name}"] = digest
            blocks += [f"% {scale}/{picture.name} sha256 {digest}", _figure(name, stem, scale)]
    return "\n".join(blocks) + "\n", digests


def split(text: str, page: int = PAGE) -> str:
    """A table of `finrepro.reporting.table.to_latex` as floats of at most `page` rows, since a
    float cannot break over pages; notes come last.
    """
    lines = text.split("\n")
    start, end = lines.index(r"\midrule") + 1, lines.index(r"\bottomrule")
    body_lines = lines[start:end]
    # Each row with the rule above it, if it has one.
    body = [
        [r"\midrule", row] if before == r"\midrule" else [row]
        for before, row in zip(["", *body_lines], body_lines, strict=False)
        if row != r"\midrule"
    ]
    after = next(
        index for index in range(end, len(lines)) if lines[index].startswith(r"\end{tabular}")
    )
    notes = lines[after + 1 : lines.index(r"\end{table*}")]
    apart = len(body[(len(body) - 1) // page * page :]) + sum(map(_height, notes)) > page + SPARE
    if len(body) <= page and not apart:
        return text
    label = re.search(r"\\label\{(tab:[^}]+)\}", text)
    # A caption of its own would give each part a number of its own.
    again = rf"{{TABLE~\ref{{{label[1] if label else ''}}} (continued)\par}}\smallskip"
    floats = []
    for first in range(0, len(body), page):
        rows = [[body[first][-1]], *body[first + 1 : first + page]]
        head = [again if first and line.startswith(r"\caption") else line for line in lines[:start]]
        below = notes if first + page >= len(body) and not apart else []
        floats += [
            *head,
            *(line for row in rows for line in row),
            *lines[end : after + 1],
            *below,
            r"\end{table*}",
        ]
    while apart and notes:
        count = next(
            (at for at in range(1, len(notes)) if sum(map(_height, notes[: at + 1])) > page),
            len(notes),
        )
        part = [NOTES * (not notes[0].startswith(NOTES)) + notes[0], *notes[1:count]]
        floats += [r"\begin{table*}", rf"\centering\small{again}", *part, r"\end{table*}"]
        notes = notes[count:]
    return "\n".join(floats) + "\n"


def _height(note: str) -> int:
    """Lines that a note takes below its table."""
    return 1 + len(note) // WIDTH


def _boxed(number: str, scale: Scale) -> str:
    """The line that stands where a table has not been made."""
    command = rf"\texttt{{./run reproduce -{{}}-table {number} -{{}}-scale {scale}}}"
    words = rf"Table {number} has not been produced at {scale} scale: {command}"
    box = rf"\parbox{{\dimexpr\linewidth-2\fboxsep-2\fboxrule}}{{\raggedright {words}}}"
    return rf"\par\medskip\noindent\fbox{{{box}}}\par\medskip"


def _figure(name: str, stem: str, scale: Scale) -> str:
    """The figure that goes with a table."""
    mark = SCALE_MARKS.get(scale, "real models")
    content = "Shares of compute, by the sizes" if table(name).computed else "Scores"
    caption = escape(f"{content} of table {name.removeprefix('table')} ({mark})")
    size = r"width=\textwidth,height=0.85\textheight,keepaspectratio"
    picture = rf"\includegraphics[{size}]{{generated/{stem}_{scale}.png}}"
    return "\n".join(
        [r"\begin{figure*}", r"\centering", picture, rf"\caption{{{caption}}}", r"\end{figure*}"]
    )


def _typeset(folder: Path, log_path: Path) -> str:
    """LaTeX and BibTeX in turn until the references do not change; the last log, also written to
    `log_path`.
    """
    fixed = {
        "SOURCE_DATE_EPOCH": "0",
        "FORCE_SOURCE_DATE": "1",
        "TZ": "UTC",
        "LC_ALL": "C",
        "max_print_line": "1000",
    }
    # Nothing outside the folder and the installation is read or written, a user's macros neither.
    confined = {
        "HOME": str(folder),
        "TEXMFVAR": str(folder / "var"),
        "openin_any": "p",
        "openout_any": "p",
    }
    variables = {"PATH": os.environ.get("PATH", "")} | fixed | confined
    latex = [
        "pdflatex",
        "-no-shell-escape",
        "-interaction=nonstopmode",
        "-halt-on-error",
        "-file-line-error",
        "main.tex",
    ]
    text = ""
    for turn in range(PASSES):
        status = _run(latex, folder, variables)
        log = folder / "main.log"
        text = (
            log.read_text(encoding="utf-8", errors="replace")
            if log.is_file()
            else "! pdflatex wrote no log\n"
        )
        files.write_text(log_path, text)
        if status:
            break
        if turn == 0:
            # A key that it misses is an undefined citation in LaTeX's log.
            _run(["bibtex", "main"], folder, variables)
        elif turn > 1 and "Rerun to get" not in text:
            break
    return text


def _run(command: list[str], folder: Path, variables: dict[str, str]) -> int:
    """A program's exit status."""
    try:
        program = subprocess.run(
            command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CellFailed(f"the paper: {command[0]} took more than {SECONDS} seconds.") from None
    return program.returncode


def _check(log: str, log_path: Path, root: Path) -> None:
    """Raise the first error of the log, or its first undefined citation or reference."""
    placed, bare = _PLACED.search(log), _BARE.search(log)
    absent = _ABSENT.search(log) if placed or bare else None
    if absent:
        raise _not_installed(root, absent[1] or "a font")
    if placed:
        raise CellFailed(
            f"the paper: {placed[3]} ({placed[1].removeprefix('./')}, line {placed[2]}; "
            f"the log is {log_path})."
        )
    if bare:
        raise CellFailed(f"the paper: {bare[1]} (the log is {log_path}).")
    loose = _LOOSE.search(log)
    if loose:
        raise CellFailed(f"the paper: {loose[1]} is {loose[2]} (the log is {log_path}).")


def _not_installed(root: Path, missing: str) -> EnvironmentFault:
    """The error on a machine without LaTeX, or without a part of it."""
    return EnvironmentFault(
        f"LaTeX is not complete here ({missing}): on Debian, apt-get install {PACKAGES}; "
        f"the tables by themselves are in {root / 'results' / 'tables'}."
    )


def _copy(path: Path, to: Path) -> str:
    """Copy a file; the sha256 of what was copied."""
    content = path.read_bytes()
    to.write_bytes(content)
    return _sha256(content)


def _sha256(content: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(content).hexdigest()
