"""The paper as a PDF: paper/*.tex with the tables of a store, typeset in a temporary folder. It
needs pdflatex and bibtex, and no torch.

The same sources, tables and LaTeX give the same bytes: dates and identifiers are fixed here and in
main.tex. results/paper/provenance.json holds the sha256 of everything that went in.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from finrepro import PROJECT
from finrepro.catalogue.reader import table, tables
from finrepro.catalogue.spec import Scale
from finrepro.errors import CellFailed, EnvironmentFault
from finrepro.evidence import files
from finrepro.reporting.table import escape

SOURCES = PROJECT / "paper"
PROGRAMS = ("pdflatex", "bibtex")
# Debian's; IEEEtran and the PostScript fonts, with what they depend on
PACKAGES = "texlive-publishers texlive-fonts-recommended"
PASSES, SECONDS = 4, 120  # most passes over the sources, and the most that one program may take
PAGE = 40  # rows of a table that fit a page together with its caption and notes
SPARE, WIDTH = 8, 120  # lines of notes below a full page of rows, and characters in such a line
NOTES = r"\par\smallskip\raggedright\footnotesize "  # how finrepro.reporting.table begins them
PLACES: dict[str, Scale] = {
    "tables": "paper",
    "appendix": "smoke",
}  # what main.tex takes in, and the scale of its tables
_PLACED = re.compile(
    r"^(\S+?\.\w+):(\d+): (.+)$", re.MULTILINE
)  # what -file-line-error makes of an error
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
            f"the paper's sources are not here ({SOURCES}/main.tex): build it from a clone of the repository."
        )
    with files.disk_errors(root), tempfile.TemporaryDirectory(prefix="finrepro-paper-") as name:
        folder = Path(name)
        inputs = {}
        for path in sorted([*SOURCES.glob("*.tex"), *SOURCES.glob("*.bib")]):
            inputs[f"paper/{path.name}"] = _copy(path, folder / path.name)
        (folder / "generated").mkdir()
        for place, scale in PLACES.items():
            text, included = results(root, scale, folder / "generated")
            (folder / "generated" / f"{place}.tex").write_text(text, encoding="utf-8")
            inputs |= included
        goal.parent.mkdir(parents=True, exist_ok=True)
        log = _typeset(folder, goal.with_suffix(".log"))
        _check(log, goal.with_suffix(".log"), root)
        pdf = (folder / "main.pdf").read_bytes()
        files.write_bytes(goal, pdf)
        latex = log.partition("\n")[0].partition(" (preloaded")[0]
        made = {"pdf_sha256": _sha256(pdf), "latex": latex, "inputs": dict(sorted(inputs.items()))}
        files.write_json(goal.with_name("provenance.json"), made)
    return goal


def results(root: Path, scale: Scale, generated: Path) -> tuple[str, dict[str, str]]:
    """The tables of one scale as LaTeX, and the sha256 of the store's files in them; copies
    their figures to `generated`.
    """
    parts, digests = ["% Written by finrepro.reporting.paper; do not edit."], {}
    for name in tables():
        stem = table(name).report
        if table(name).computed and scale != "paper":
            continue  # of the real models alone
        folder = root / "results" / "tables" / scale
        # `--full` writes files of its own: the same table with more cells and seeds.
        found = [
            path for path in (folder / f"{stem}-full.tex", folder / f"{stem}.tex") if path.is_file()
        ]
        if len(found) == 2 and b"(not run)" in found[0].read_bytes():
            found.reverse()  # `--full --only` has run a few of its cells
        if not found:
            parts.append(_boxed(name.removeprefix("table"), scale))
            continue
        source = found[0]
        content = source.read_bytes()
        digests[f"results/tables/{scale}/{source.name}"] = _sha256(content)
        parts += [f"% {scale}/{source.name} sha256 {_sha256(content)}", split(content.decode())]
        picture = source.with_suffix(".png")
        if picture.is_file():
            digest = _copy(picture, generated / f"{stem}_{scale}.png")
            digests[f"results/tables/{scale}/{picture.name}"] = digest
            parts += [f"% {scale}/{picture.name} sha256 {digest}", _figure(name, stem, scale)]
    return "\n".join(parts) + "\n", digests


def split(text: str, most: int = PAGE) -> str:
    """A table of `finrepro.reporting.table.to_latex` as floats of at most `most` rows, since a
    float cannot break over pages; notes come last.
    """
    lines = text.split("\n")
    start, end = lines.index(r"\midrule") + 1, lines.index(r"\bottomrule")
    inside = lines[start:end]
    # Each row with the rule above it, if it has one.
    body = [
        [r"\midrule", row] if before == r"\midrule" else [row]
        for before, row in zip(["", *inside], inside, strict=False)
        if row != r"\midrule"
    ]
    after = next(
        index for index in range(end, len(lines)) if lines[index].startswith(r"\end{tabular}")
    )
    notes = lines[after + 1 : lines.index(r"\end{table*}")]
    apart = len(body[(len(body) - 1) // most * most :]) + sum(map(_height, notes)) > most + SPARE
    if len(body) <= most and not apart:
        return text
    label = re.search(r"\\label\{(tab:[^}]+)\}", text)
    # A caption of its own would give each part a number of its own.
    again = rf"{{TABLE~\ref{{{label[1] if label else ''}}} (continued)\par}}\smallskip"
    floats = []
    for first in range(0, len(body), most):
        rows = [[body[first][-1]], *body[first + 1 : first + most]]
        head = [again if first and line.startswith(r"\caption") else line for line in lines[:start]]
        below = notes if first + most >= len(body) and not apart else []
        floats += [
            *head,
            *(line for row in rows for line in row),
            *lines[end : after + 1],
            *below,
            r"\end{table*}",
        ]
    while apart and notes:
        count = next(
            (at for at in range(1, len(notes)) if sum(map(_height, notes[: at + 1])) > most),
            len(notes),
        )
        own = [NOTES * (not notes[0].startswith(NOTES)) + notes[0], *notes[1:count]]
        floats += [r"\begin{table*}", rf"\centering\small{again}", *own, r"\end{table*}"]
        notes = notes[count:]
    return "\n".join(floats) + "\n"


def _height(note: str) -> int:
    """Lines that a note takes below its table."""
    return 1 + len(note) // WIDTH


def _boxed(number: str, scale: Scale) -> str:
    """The line that stands where a table has not been made."""
    command = rf"\texttt{{./run reproduce -{{}}-table {number} -{{}}-scale {scale}}}"
    words = rf"Table {number} has not been produced at {scale} scale: {command}"
    return rf"\par\medskip\noindent\fbox{{\parbox{{\dimexpr\linewidth-2\fboxsep-2\fboxrule}}{{\raggedright {words}}}}}\par\medskip"


def _figure(name: str, stem: str, scale: Scale) -> str:
    """The figure that goes with a table."""
    mark = (
        "SMOKE: miniatures, never to be set against published values"
        if scale == "smoke"
        else "real models"
    )
    what = "Shares of compute, by the sizes" if table(name).computed else "Scores"
    caption = escape(f"{what} of table {name.removeprefix('table')} ({mark})")
    size = r"width=\textwidth,height=0.85\textheight,keepaspectratio"
    picture = rf"\includegraphics[{size}]{{generated/{stem}_{scale}.png}}"
    return "\n".join(
        [r"\begin{figure*}", r"\centering", picture, rf"\caption{{{caption}}}", r"\end{figure*}"]
    )


def _typeset(folder: Path, kept: Path) -> str:
    """LaTeX and BibTeX in turn until the references stand still; the last log, also written to
    `kept`.
    """
    fixed = {
        "SOURCE_DATE_EPOCH": "0",
        "FORCE_SOURCE_DATE": "1",
        "TZ": "UTC",
        "LC_ALL": "C",
        "max_print_line": "1000",
    }
    # Nothing outside the folder and the installation is read or written, and a user's own macros do
    # not count.
    own = {
        "HOME": str(folder),
        "TEXMFVAR": str(folder / "var"),
        "openin_any": "p",
        "openout_any": "p",
    }
    surroundings = {"PATH": os.environ.get("PATH", "")} | fixed | own
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
        status = _run(latex, folder, surroundings)
        log = folder / "main.log"
        text = (
            log.read_text(encoding="utf-8", errors="replace")
            if log.is_file()
            else "! pdflatex wrote no log\n"
        )
        files.write_text(kept, text)
        if status:
            break
        if turn == 0:
            _run(
                ["bibtex", "main"], folder, surroundings
            )  # what it misses is an undefined citation in LaTeX's log
        elif turn > 1 and "Rerun to get" not in text:
            break
    return text


def _run(command: list[str], folder: Path, surroundings: dict[str, str]) -> int:
    """A program's exit status."""
    try:
        answer = subprocess.run(
            command,
            cwd=folder,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CellFailed(f"the paper: {command[0]} took more than {SECONDS} seconds.") from None
    return answer.returncode


def _check(log: str, kept: Path, root: Path) -> None:
    """Raise what the log complains about: an error, or a citation or reference that leads
    nowhere.
    """
    placed, bare = _PLACED.search(log), _BARE.search(log)
    absent = _ABSENT.search(log) if placed or bare else None
    if absent:
        raise _not_installed(root, absent[1] or "a font")
    if placed:
        raise CellFailed(
            f"the paper: {placed[3]} ({placed[1].removeprefix('./')}, line {placed[2]}; the log is {kept})."
        )
    if bare:
        raise CellFailed(f"the paper: {bare[1]} (the log is {kept}).")
    loose = _LOOSE.search(log)
    if loose:
        raise CellFailed(f"the paper: {loose[1]} is {loose[2]} (the log is {kept}).")


def _not_installed(root: Path, what: str) -> EnvironmentFault:
    """The one line for a machine without LaTeX."""
    where = root / "results" / "tables"
    return EnvironmentFault(
        f"LaTeX is not complete here ({what}): on Debian, apt-get install {PACKAGES}; the tables by themselves are in {where}."
    )


def _copy(path: Path, to: Path) -> str:
    """Copy a file; the sha256 of what was copied."""
    content = path.read_bytes()
    to.write_bytes(content)
    return _sha256(content)


def _sha256(content: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(content).hexdigest()
