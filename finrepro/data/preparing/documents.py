"""Where one document of a text file ends and the next begins. Only lines that are text: a
damaged one costs its document, not the file.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from finrepro.errors import unknown

Fault = Callable[[str, int, str], None]  # file, line, reason
Lines = Iterable[bytes]
HEADING = re.compile(rb" = [^=\s].*[^=\s] = \s*|= [^=\s].*[^=\s] =\s*")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the line of the file that it begins in, from 1."""

    text: str
    line: int


def split_file(rule: str, lines: Lines, name: str, fault: Fault) -> Iterator[Document]:
    """The documents of a file by a named rule. Damaged ones go to `fault`; an empty one has only
    white space and is left to the caller.

    `file`: all of it. `articles`: WikiText's, each begins at its heading ` = Title = ` with a blank
    line before. `lines`: each line. `paragraphs`: parted by blank lines. Raises `UsageError` for
    another rule.
    """
    if rule not in RULES:
        raise unknown("rule for documents", rule, RULES)
    for line, parts in RULES[rule](lines):
        document = _decoded(parts, line, name, fault)
        if document is not None:
            yield document


def _decoded(parts: list[bytes], line: int, name: str, fault: Fault) -> Document | None:
    content = b"".join(parts)
    if line == 1:
        content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        if b"\0" not in content:
            return Document(content.decode(), line)
        at, reason = content.index(b"\0"), "binary data (a NUL byte)"
    except UnicodeDecodeError as error:
        at, reason = error.start, f"not UTF-8 ({error.reason})"
    fault(name, line + content.count(b"\n", 0, at), reason)
    return None


def _file(lines: Lines) -> Iterator[tuple[int, list[bytes]]]:
    yield 1, list(lines)


def _each_line(lines: Lines) -> Iterator[tuple[int, list[bytes]]]:
    for number, line in enumerate(lines, 1):
        yield number, [line.rstrip(b"\r\n")]


def _paragraphs(lines: Lines) -> Iterator[tuple[int, list[bytes]]]:
    held: list[bytes] = []
    number = 0
    for number, line in enumerate(lines, 1):
        if line.strip():
            held.append(line)
        elif held:
            yield number - len(held), held
            held = []
    if held:
        yield number + 1 - len(held), held


def _articles(lines: Lines) -> Iterator[tuple[int, list[bytes]]]:
    held: list[bytes] = []
    first = 1
    for number, line in enumerate(lines, 1):
        if HEADING.fullmatch(line) and held and not held[-1].strip():
            yield first, held
            held, first = [], number
        held.append(line)
    if held:
        yield first, held


RULES = {"file": _file, "articles": _articles, "lines": _each_line, "paragraphs": _paragraphs}
