"""Law: the house stays one that can be read: folders, arrows, words, lines and names of types."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from finrepro import PROJECT

PACKAGE = PROJECT / "finrepro"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROSE = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("findings/*.md")])
# Words that name nothing: a binding is called by what it is.
ALL_PURPOSE = frozenset(
    re.findall(
        r"\w+",
        "asked chosen done each every found given held here kept known left made mine named needed "
        "other others right said seen shown taken theirs told wanted what whole wrong",
    )
)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def bindings(module: ast.AST) -> list[str]:
    """Every name that the source binds: variables, loop variables, parameters."""
    return [
        node.id if isinstance(node, ast.Name) else node.arg
        for node in ast.walk(module)
        if isinstance(node, ast.arg)
        or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    ]


def arrows() -> list[tuple[Path, Path]]:
    """Who imports whom, file by file."""
    files = {".".join(path.relative_to(PROJECT).with_suffix("").parts): path for path in SOURCES}
    found = set()
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {(path, files[name]) for name in [*names, node.module] if name in files}
    return sorted((start, end) for start, end in found if start != end)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def test_the_package_has_few_rooms():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert len(folders) <= 18 and len(files) <= 8, (folders, files)


def test_a_third_of_the_imports_stay_inside_a_room():
    every = arrows()
    inside = sum(room(start) == room(end) for start, end in every)
    assert len(every) > 500, "the scan of imports is broken"
    assert inside / len(every) >= 0.35, f"{inside} of {len(every)}"


def test_bindings_are_called_by_what_they_are():
    counted = Counter(name for path in SOURCES for name in bindings(tree(path)))
    empty = sum(counted[word] for word in ALL_PURPOSE)
    assert counted.total() > 5000, "the scan of names is broken"
    assert empty / counted.total() < 0.01, {word: counted[word] for word in ALL_PURPOSE}


def test_the_scan_of_names_sees_variables_loops_and_parameters():
    """The planted mutant of the law above."""
    source = "def f(each, *, kept=1):\n    found = [said for said in each]\n    return kept.other"
    assert Counter(bindings(ast.parse(source))) == Counter(["each", "kept", "found", "said"])


def test_no_two_public_types_have_one_name():
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path.relative_to(PACKAGE).as_posix())
    of_kinds = ("Config", "Stored")  # each kind has its own, by the contract
    twice = {
        name: paths for name, paths in places.items() if len(paths) > 1 and name not in of_kinds
    }
    assert twice == {}


def json_calls(module: ast.AST) -> list[str]:
    """The functions of Python's own `json` that the source calls, and those imported from it."""
    return [
        node.attr if isinstance(node, ast.Attribute) else node.names[0].name
        for node in ast.walk(module)
        if (isinstance(node, ast.Attribute) and ast.unparse(node.value) == "json")
        or (isinstance(node, ast.ImportFrom) and node.module == "json")
    ]


def test_json_is_read_and_written_strictly():
    """NaN and Infinity are no JSON. Settings alone cannot import from the evidence."""
    below = {"settings.py", "catalogue/reader.py", "strict_json.py"}
    callers = {path.relative_to(PACKAGE).as_posix() for path in SOURCES if json_calls(tree(path))}
    assert callers == below
    assert json_calls(ast.parse("import json\njson.loads('1')")) == ["loads"]


# Readers that get no file: the pipe between a driver and its worker, and a value made plain.
NO_FILES = {"running/worker.py", "campaigns/local.py", "data/preparing/prepare.py"}


def unbounded_reads(module: ast.AST) -> list[str]:
    """Calls that hand a parser a file, or text that may come from one, without a bound."""
    found = []
    for function in (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)):
        calls = [ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Call)]
        parsed = [
            call
            for call in calls
            if re.match(r"(strict_json|json|tomllib)\.loads?\(|yaml\.\w*(load|parse|scan)", call)
        ]
        if any(call.startswith("bounds.loads(") for call in calls):
            parsed += [
                call
                for call in calls
                if re.search(r"(?<!bounds)\.(read_text\(|read_bytes\(|read\(\)$)", call)
            ]
        found += parsed
    return found


def test_no_parser_reads_a_file_without_a_bound():
    """bounds.py is the one seam of JSON, settings.py that of YAML, which it bounds by bounds.py."""
    readers = {
        path.relative_to(PACKAGE).as_posix(): calls
        for path in SOURCES
        if (calls := unbounded_reads(tree(path)))
    }
    # The reader parses what it has just written, to keep it.
    seams = {"bounds.py", "strict_json.py", "settings.py", "catalogue/reader.py"}
    assert readers.keys() == seams | NO_FILES, readers
    assert "bounds.read_text(path" in (PACKAGE / "settings.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    [
        "json.load(path.open())",
        "strict_json.loads(path.read_text())",
        "yaml.safe_load(path.open())",
        "yaml.load(text, Loader=yaml.CSafeLoader)",
        "tomllib.loads(text)",
        "bounds.loads(path.read_bytes())",
        "bounds.loads(file.read())",
    ],
)
def test_the_scan_of_readers_sees_each_way_around_the_bounds(line: str):
    """The planted mutants of the law above."""
    assert unbounded_reads(ast.parse(f"def f(path, file, text):\n    return {line}"))
    within = "content = bounds.read_bytes(path)\n    return bounds.loads(content)"
    assert not unbounded_reads(ast.parse(f"def f(path):\n    {within}"))


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_prose_has_lines_of_at_most_a_hundred_columns(path: Path):
    fenced, wide = False, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        if len(line) > 100 and not line.startswith("|") and not re.search(r"\]\(|^\S+$", line):
            wide.append(number)
    assert wide == []


def test_no_line_is_kept_from_the_formatter():
    skipped = [path for path in SOURCES if "fmt: skip" in path.read_text(encoding="utf-8")]
    assert skipped == []


def test_the_quick_tests_are_there():
    """A file that is renamed is not left out of `./run test --quick` without a word."""
    for line in (PROJECT / "tests" / "quick.txt").read_text().splitlines():
        assert (PROJECT / line.partition("::")[0]).exists(), line
