"""Documents from files on this machine: text, JSON lines (both also compressed by gzip), Parquet,
and folders of them, in the order of their names.

Nothing is skipped in silence: a damaged file, line or row is reported to `fault`, which counts it
or raises.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from finrepro import bounds
from finrepro.data.preparing.documents import RULES, Document, Fault, split_file
from finrepro.errors import EnvironmentFault, unknown

TEXT, JSONL, PARQUET = (".txt", ".text", ".raw", ".tokens"), (".jsonl", ".ndjson"), (".parquet",)
SUFFIXES = TEXT + JSONL + PARQUET
# Kinds whose marks, keys and quotes would be read as text, and what to do about them.
STRUCTURED = {
    ".json": "write it as JSON lines, an object a line, and name it .jsonl",
    **dict.fromkeys((".csv", ".tsv"), "write it as JSON lines or Parquet"),
    **dict.fromkeys(
        (".html", ".htm", ".xml", ".xbrl", ".pdf", ".zip", ".tar", ".docx", ".xlsx", ".arrow"),
        "write its text as .txt, JSON lines or Parquet",
    ),
}


@dataclass(frozen=True)
class LocalFiles:
    """A file or a folder. `documents` is the rule that splits text files, `field` the text's name
    in JSON lines and Parquet.
    """

    path: Path
    documents: str = "file"
    field: str = "text"

    def __post_init__(self) -> None:
        """Raises `UsageError` for an unknown rule, `EnvironmentFault` where there is nothing to
        read.
        """
        if self.documents not in RULES:
            raise unknown("rule for documents", self.documents, RULES)
        if not self.path.exists():
            raise EnvironmentFault(f"{self.path}: no such file or folder.")
        if (kind := kind_of(self.path)) in STRUCTURED and not self.path.is_dir():
            raise EnvironmentFault(f"{self.path}: a {kind} file is not read: {STRUCTURED[kind]}.")
        if not self.files:
            raise EnvironmentFault(
                f"{self.path} holds no file of a known kind: {', '.join(SUFFIXES)}, or with .gz."
            )

    @property
    def files(self) -> list[Path]:
        """The files, by name; of a folder those of a known kind that are not hidden."""
        if not self.path.is_dir():
            return [self.path]
        inside = sorted(path for path in self.path.rglob("*") if path.is_file())
        return [
            path
            for path in inside
            if kind_of(path) in SUFFIXES and not _hidden(path.relative_to(self.path))
        ]

    @property
    def description(self) -> dict[str, Any]:
        """What the index records of the source, wherever it lies: its files' sizes in bytes."""
        sizes = {self._name(path): path.stat().st_size for path in self.files}
        return {"files": sizes, "documents": self.documents, "field": self.field}

    @property
    def size(self) -> int | None:
        """Bytes of text, None where they are not known before (compressed files)."""
        plain = all(kind_of(path) in TEXT and path.suffix != ".gz" for path in self.files)
        return sum(path.stat().st_size for path in self.files) if plain else None

    def read(self, fault: Fault) -> Iterator[tuple[str, Document]]:
        """(file's name, document), one after the other."""
        for path in self.files:
            name, kind = self._name(path), kind_of(path)
            try:
                if path.stat().st_size == 0:
                    fault(name, 0, "the file is empty")
                    continue
                if kind in PARQUET:
                    documents = _rows(path, name, self.field, fault)
                elif kind in JSONL:
                    documents = _json_lines(path, name, self.field, fault)
                else:
                    documents = _text(path, name, self.documents, fault)
                for document in documents:
                    yield name, document
            except bounds.TooLarge as error:
                fault(name, 0, f"{error}; from there on the file is not read")
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                fault(name, 0, f"the compressed file is damaged or cut short ({error})")
            except OSError as error:
                raise EnvironmentFault(f"{path}: {error.strerror or error}.") from None

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix() if self.path.is_dir() else path.name


def kind_of(path: Path) -> str:
    """The suffix that names the format, without .gz."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return suffixes[-1].lower() if suffixes else ""


def _hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")


def _text(path: Path, name: str, rule: str, fault: Fault) -> Iterator[Document]:
    with _opened(path) as file:
        # An archive or a picture is one fault, not one for each of its lines.
        if b"\0" in file.read(1 << 16):
            fault(name, 1, "a binary file (it has NUL bytes)")
            return
        file.seek(0)
        yield from split_file(rule, file, name, fault)


def _json_lines(path: Path, name: str, field: str, fault: Fault) -> Iterator[Document]:
    with _opened(path) as file:
        for number, line in enumerate(bounds.lines(file), 1):
            if not line.strip():
                continue
            try:
                row = bounds.loads(line)
            except ValueError as error:  # undecodable bytes are one, too
                fault(name, number, f"not JSON ({error})")
                continue
            text = row.get(field) if isinstance(row, dict) else None
            if isinstance(text, str):
                yield Document(text, number)
            else:
                fault(name, number, no_text_reason(field, row))


def _rows(path: Path, name: str, field: str, fault: Fault) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                fault(
                    name, 0, f"no column '{field}'; there are {', '.join(file.schema_arrow.names)}"
                )
                return
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if isinstance(text, str):
                        yield Document(text, number)
                    else:
                        fault(name, number, no_text_reason(field, {field: text}))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        fault(name, 0, f"not a Parquet file that can be read ({str(error).splitlines()[0]})")


def no_text_reason(field: str, row: Any) -> str:
    """Why a row has no text in its `field`."""
    if not isinstance(row, dict):
        return f"expected an object with a field '{field}'"
    if field not in row:
        return f"no field '{field}'; there are {', '.join(sorted(row)) or 'none'}"
    return f"the field '{field}' is {type(row[field]).__name__}, expected text"
