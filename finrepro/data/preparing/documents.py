"""Rules that split a text file into documents. A damaged line costs its document, not the file."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from finrepro.errors import unknown

Fault = Callable[[str, int, str], None]  # file, line, reason
Lines = Iterable[bytes]
HEADING = re.compile(rb" = [^=\s].*[^=\s] = \s*|= [^=\s].*[^=\s] =\s*")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the number of the line, from 1, that it begins in."""

    text: str
    line: int


def split_file(rule: str, lines: Lines, name: str, fault: Fault) -> Iterator[Document]:
    """The documents of a file by a named rule. Damaged ones are reported to `fault`; documents of
    white space alone are left to the caller.

    `file`: the file is one document. `articles`: WikiText's, each begins at its heading
    ` = Title = ` after a blank line. `lines`: a document a line. `paragraphs`: separated by blank
    lines. Raises `UsageError` for another rule.
    """
    if rule not in RULES:
        raise unknown("rule for documents", rule, RULES)
    for number, document_lines in RULES[rule](lines):
        document = _decoded(document_lines, number, name, fault)
        if document is not None:
            yield document


def _decoded(lines: list[bytes], number: int, name: str, fault: Fault) -> Document | None:
    content = b"".join(lines)
    if number == 1:
        content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        if b"\0" not in content:
            return Document(content.decode(), number)
        at, reason = content.index(b"\0"), "binary data (a NUL byte)"
    except UnicodeDecodeError as error:
        at, reason = error.start, f"not UTF-8 ({error.reason})"
    fault(name, number + content.count(b"\n", 0, at), reason)
    return None


def _file(lines: Lines) -> Iterator[tuple[int, list[bytes]]]:
    yield 1, list(lines)


def _one_a_line(lines: Lines) -> Iterator[tuple[int, list[bytes]]]:
    for number, line in enumerate(lines, 1):
        yield number, [line.rstrip(b"\r\n")]


def _paragraphs(lines: Lines) -> Iterator[tuple[int, list[bytes]]]:
    paragraph: list[bytes] = []
    number = 0
    for number, line in enumerate(lines, 1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield number - len(paragraph), paragraph
            paragraph = []
    if paragraph:
        yield number + 1 - len(paragraph), paragraph


def _articles(lines: Lines) -> Iterator[tuple[int, list[bytes]]]:
    article: list[bytes] = []
    first = 1
    for number, line in enumerate(lines, 1):
        if HEADING.fullmatch(line) and article and not article[-1].strip():
            yield first, article
            article, first = [], number
        article.append(line)
    if article:
        yield first, article


RULES = {"file": _file, "articles": _articles, "lines": _one_a_line, "paragraphs": _paragraphs}
