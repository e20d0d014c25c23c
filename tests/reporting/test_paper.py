"""Law: the paper takes its results from a store and says what is missing, leads every citation
somewhere, and is the same bytes twice.
"""

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from fixtures.process import one_line

from finrepro.catalogue.reader import tables
from finrepro.errors import CellFailed, EnvironmentFault
from finrepro.reporting import paper
from finrepro.reporting.table import Line, Table, to_latex

MAIN = (paper.SOURCES / "main.tex").read_text(encoding="utf-8")
BIBLIOGRAPHY = (paper.SOURCES / "refs.bib").read_text(encoding="utf-8")
needs_latex = pytest.mark.skipif(
    any(shutil.which(program) is None for program in paper.PROGRAMS),
    reason=f"LaTeX is not here: on Debian, apt-get install {paper.PACKAGES}",
)
NUMBER = re.compile(r"\d\.\d|\d\s*(\\,)?\s*\\?%")  # 0.91, 91 %, 91\%, 91\,\%
CITED = re.compile(r"\\cite\{([^}]+)\}")
ENTRY = re.compile(r"^@\w+\{([^,]+),", re.MULTILINE)


def made_up(rows: int = 3, label: str = "made_up", more: int = 0) -> Table:
    """A wide table with every character that LaTeX reads as an order, and a note that begins as
    an option of `\\\\` would.
    """
    columns = (
        "Task_&_%",
        "Model #1",
        "Cost $",
        "{Braces}",
        "Tilde ~",
        "Caret ^",
        "Back\\slash",
        "Less < more >",
        "Bars |",
        "é − ≥",
    )
    lines = tuple(
        Line((f"row_{at}", *("50 % & more_or_less" for _ in columns[1:])), section=str(at // 5))
        for at in range(rows)
    )
    notes = (
        "* a star & 100 %: \\input{nothing}",
        "[1] in brackets_",
        "a plain one",
        *(f"note {at}: {'why it is so, ' * 20}" for at in range(more)),
    )
    return Table(
        "table3",
        label=label,
        caption="100 % made_up & wide",
        columns=columns,
        lines=lines,
        notes=notes,
    )


def put(root: Path, scale: str, name: str, text: str) -> None:
    folder = root / "results" / "tables" / scale
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.tex").write_text(text, encoding="utf-8")


def cited(text: str) -> set[str]:
    return {key.strip() for keys in CITED.findall(text) for key in keys.split(",")}


def section(title: str, text: str = MAIN) -> str:
    return text.partition(rf"\section{{{title}}}")[2].partition(r"\section{")[0]


def test_without_latex_one_line_names_the_packages_and_where_the_tables_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EnvironmentFault) as raised:
        paper.build(tmp_path)
    message = one_line(raised.value)
    assert "apt-get install texlive-publishers texlive-fonts-recommended" in message
    assert str(tmp_path / "results" / "tables") in message and raised.value.exit_code == 3
    assert not (tmp_path / "results").exists()


def test_every_citation_has_its_entry_and_every_entry_is_cited():
    entries = ENTRY.findall(BIBLIOGRAPHY)
    assert len(entries) == len(set(entries)) and len(entries) >= 15
    assert cited(MAIN) == set(entries)
    assert cited(MAIN.replace(r"\cite{lora}", "", 1)) != set(entries)  # the law can fail


def incomplete(text: str) -> list[str]:
    """Entries without a title, a year or, unless they are a repository at a commit, an author."""
    missing = []
    for entry in re.findall(r"^@\w+\{.*$", text, re.MULTILINE):
        needed = {"title", "year"} | (
            set() if re.search(r"howpublished = \{GitHub, .* commit", entry) else {"author"}
        )
        if needed - set(re.findall(r"(\w+) = \{", entry)):
            missing.append(entry.partition("{")[2].partition(",")[0])
    return missing


def test_every_entry_says_who_wrote_what_and_when():
    assert incomplete(BIBLIOGRAPHY) == []
    assert incomplete(BIBLIOGRAPHY.replace("author = {Edward J. Hu", "by = {Edward J. Hu", 1)) == [
        "lora"
    ]


def test_no_result_is_typed():
    """Decimals and percentages stand only where a published claim is quoted, on a line that
    cites it.
    """
    assert section("Results").strip()
    for title in ("Results", "Reproducibility", "Limitations", "Evaluation"):
        assert not NUMBER.search(section(title)), title
    # The names of models, and of a licence, are no results.
    text = re.sub(
        r"Llama-3\.1|with 1\.5 billion|BY(-NC-SA)? 3\.0", "", MAIN.partition(r"\begin{document}")[2]
    )
    typed = [line for line in text.splitlines() if NUMBER.search(line)]
    assert len(typed) == 8 and all(r"\cite{" in line for line in typed)
    for wrong in ("0.912", r"91\%", r"91\,\%", "91 %"):
        assert NUMBER.search(
            section(
                "Results", MAIN.replace("The tables below", f"We reach {wrong}. The tables below")
            )
        )


@pytest.mark.parametrize("scale", ["paper", "open", "smoke"])
def test_an_absent_table_has_a_box_with_its_command(tmp_path: Path, scale):
    text, digests = paper.results(tmp_path, scale, tmp_path)
    assert digests == {}
    wanted = {
        "paper": [*tables()],
        "open": ["table3", "table5"],
        "smoke": [name for name in tables() if name != "table1"],
    }[scale]
    for name in wanted:
        number = name.removeprefix("table")
        assert f"Table {number} has not been produced at {scale} scale" in text
        assert rf"./run reproduce -{{}}-table {number} -{{}}-scale {scale}" in text
    assert text.count(r"\fbox{") == len(wanted)


@pytest.mark.parametrize(
    ("scale", "mark"), [("smoke", "SMOKE: "), ("open", "OPEN: "), ("paper", "real models")]
)
def test_a_figure_says_of_what_models_it_is(tmp_path: Path, scale, mark):
    put(tmp_path, scale, "table3", to_latex(made_up()))
    (tmp_path / "results" / "tables" / scale / "table3.png").write_bytes(b"a picture")
    text, _ = paper.results(tmp_path, scale, tmp_path)
    (line,) = (line for line in text.splitlines() if "Scores of table 3" in line)
    assert mark in line


def test_a_table_that_is_there_is_taken_in_with_its_digest(tmp_path: Path):
    content = to_latex(made_up())
    put(tmp_path, "paper", "table3", content)
    text, digests = paper.results(tmp_path, "paper", tmp_path)
    digest = sha256(content.encode()).hexdigest()
    assert digests == {"results/tables/paper/table3.tex": digest}
    assert content in text and digest in text and "Table 3 has not" not in text
    assert (
        "Table 3 has not" in paper.results(tmp_path, "smoke", tmp_path)[0]
    )  # a scale never stands in for another
    put(tmp_path, "paper", "table3-quick", "quick")
    assert paper.results(tmp_path, "paper", tmp_path)[1] == digests
    put(tmp_path, "paper", "table3-full", to_latex(made_up(4)))
    assert set(paper.results(tmp_path, "paper", tmp_path)[1]) == {
        "results/tables/paper/table3-full.tex"
    }


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 12, 13])
def test_a_long_table_keeps_every_row_once_and_in_order(rows: int):
    whole = to_latex(made_up(rows))
    text = paper.split(whole, page=6)
    parts = -(-rows // 6)
    assert re.findall(r"row\\_(\d+) ", text) == [str(at) for at in range(rows)]
    assert (
        text.count(r"\begin{table*}")
        == text.count(r"\end{table*}")
        == text.count(r"\toprule")
        == parts
    )
    assert text.count(r"\caption{") == text.count("in brackets") == 1
    assert text.count("(continued)") == parts - 1 and (parts > 1 or text == whole)


@pytest.mark.parametrize(("rows", "more"), [(3, 1), (3, 9), (6, 9), (13, 30)])
def test_notes_that_do_not_fit_below_their_table_stand_by_themselves(rows: int, more: int):
    whole = to_latex(made_up(rows, more=more))
    text = paper.split(whole, page=6)
    assert re.findall(r"^(?:\\par.*)?note (\d+):", text, re.MULTILINE) == [
        str(at) for at in range(more)
    ]
    assert (
        text.count(r"\begin{table*}")
        == text.count(r"\end{table*}")
        == text.count(paper.NOTES) + text.count(r"\toprule") - (more < 9)
    )
    assert re.findall(r"row\\_(\d+) ", text) == [str(at) for at in range(rows)]
    assert (text == whole) == (more == 1)


@needs_latex
def test_the_same_inputs_give_the_same_pdf(tmp_path: Path):
    for root in (tmp_path / "first", tmp_path / "another folder"):
        put(root, "smoke", "table3", to_latex(made_up()))
    first, second = (
        paper.build(tmp_path / name).read_bytes() for name in ("first", "another folder")
    )
    assert first.startswith(b"%PDF-") and first == second
    folder = tmp_path / "first" / "results" / "paper"
    made = json.loads((folder / "provenance.json").read_text())
    assert made["pdf_sha256"] == sha256(first).hexdigest()
    assert set(made["inputs"]) == {
        "paper/main.tex",
        "paper/refs.bib",
        "results/tables/smoke/table3.tex",
    }
    put(tmp_path / "first", "smoke", "table3", to_latex(made_up(4)))
    assert paper.build(tmp_path / "first").read_bytes() != first  # the law can fail


@needs_latex
def test_wide_long_tables_with_every_special_character_are_set_on_their_pages(tmp_path: Path):
    put(tmp_path, "paper", "table3", to_latex(made_up(130, "table3_paper", more=70)))
    put(tmp_path, "paper", "table5", to_latex(made_up(40, "table5_paper", more=1)))
    put(tmp_path, "smoke", "table3", to_latex(made_up(7, "table3_smoke")))
    written = paper.build(tmp_path, tmp_path / "elsewhere" / "draft.pdf")
    assert written.read_bytes().startswith(b"%PDF-")
    log = written.with_suffix(".log").read_text()
    assert (
        "Float too large" not in log and "Overfull" not in log and "unprocessed floats" not in log
    )


@needs_latex
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (r"\nosuchorder", r"Undefined control sequence. \(generated/tables.tex, line \d+"),
        (r"see~\cite{nobody}", "Citation `nobody' is undefined"),
        (r"see~\ref{tab:none}", "Reference `tab:none' is undefined"),
        (r"\label{sec:results}", "Label `sec:results' is multiply defined"),
        ("\u2603", "Unicode character"),
    ],
)
def test_what_latex_complains_about_is_one_line_and_the_old_pdf_stays(
    tmp_path: Path, wrong: str, said: str
):
    old = tmp_path / "results" / "paper" / "main.pdf"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"the old one")
    put(tmp_path, "paper", "table3", to_latex(made_up()) + wrong + "\n")
    with pytest.raises(CellFailed) as raised:
        paper.build(tmp_path)
    assert re.search(said, one_line(raised.value)) and str(old.with_suffix(".log")) in str(
        raised.value
    )
    assert old.with_suffix(".log").is_file() and old.read_bytes() == b"the old one"


@needs_latex
def test_a_class_that_is_not_installed_is_the_machines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sources = shutil.copytree(paper.SOURCES, tmp_path / "sources")
    (sources / "main.tex").write_text(
        MAIN.replace("{IEEEtran}\n", "{NoSuchClass}\n", 1), encoding="utf-8"
    )
    monkeypatch.setattr(paper, "SOURCES", sources)
    with pytest.raises(EnvironmentFault, match=r"NoSuchClass\.cls.*texlive-publishers"):
        paper.build(tmp_path)


@needs_latex
def test_a_table_cannot_read_files_outside_or_start_programs(tmp_path: Path):
    (tmp_path / "secret.tex").write_text("never shown")
    put(
        tmp_path,
        "paper",
        "table3",
        to_latex(made_up()) + rf"\input{{{tmp_path}/secret.tex}}" + "\n",
    )
    with pytest.raises((CellFailed, EnvironmentFault)):
        paper.build(tmp_path)
    put(
        tmp_path,
        "paper",
        "table3",
        to_latex(made_up()) + rf"\immediate\write18{{touch {tmp_path}/started}}" + "\n",
    )
    paper.build(tmp_path)
    assert not (tmp_path / "started").exists()
