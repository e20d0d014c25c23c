"""`invoke data --prepare` and `--verify`: check the options, show progress, describe the corpus."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finrepro.arguments import count, fraction
from finrepro.data.corpora.folders import copy_tokenizer
from finrepro.data.corpora.index import Index
from finrepro.data.preparing.entries import HeldOut, named_or_path
from finrepro.data.preparing.prepare import (
    PrepareOptions,
    Progress,
    Sources,
    default_workers,
    prepare,
)
from finrepro.data.preparing.quarantine import check_choice
from finrepro.data.preparing.sources import JSONL, PARQUET, kind_of
from finrepro.data.preparing.tokenizing import load_encoder
from finrepro.data.preparing.verify import corpus_faults
from finrepro.errors import UsageError

# Bytes of text that one process has tokenized before several have started.
ONE_WORKER_BELOW = 16_000_000
VALIDATION = 0.005  # of the documents, by default
LEFT_OUT = {
    "duplicates": "duplicates",
    "empty": "empty",
    "quarantined": "damaged (quarantine.jsonl)",
}


@dataclass(frozen=True)
class PreparedCorpus:
    """A finished corpus: its folder and its index."""

    folder: Path
    index: Index

    def show(self) -> None:
        """Print what it holds."""
        print("\n".join(description(self.folder, self.index)))


@dataclass(frozen=True)
class CheckedCorpus:
    """A corpus whose bytes were checked, and a line for each fault."""

    folder: Path
    index: Index
    damaged: tuple[str, ...]

    def show(self) -> None:
        """Print the faults, what the corpus holds, and how many shards were read."""
        for line in self.damaged:
            print(f"damaged: {line}")
        print("\n".join(description(self.folder, self.index)))
        shards = sum(len(split.shards) for split in self.index.splits.values())
        print(f"{shards} shards, {len(self.damaged)} damaged")


def prepare_corpus(
    source: str,
    tokenizer: Path,
    out: Path,
    data_dir: Path | None = None,
    *,
    workers: int | None = None,
    on_error: str = "stop",
    field: str | None = None,
    documents: str | None = None,
    validation: float | None = None,
) -> PreparedCorpus:
    """Tokenize `source`, a corpus of configs/corpora.yaml, a file or a folder, into shards in
    `out`, or resume.

    `tokenizer` is the folder of the model's; `workers` tokenize (by default a core each), which
    never changes a byte; `on_error` is `stop` at damaged text, or `skip` it into quarantine.jsonl.
    For files of one's own, `field` is the text's in JSON lines or Parquet, and `documents` the rule
    that cuts text: `file`, `articles`, `lines` or `paragraphs`. `validation` is the fraction of
    the documents that is held out. Raises `UsageError`, and `EnvironmentFault` for damaged text.
    """
    workers = None if workers is None else count("workers", workers)
    share = None if validation is None else fraction("validation", validation)
    check_choice(on_error)
    rules = {"field": field, "documents": documents}
    local = {option: value for option, value in rules.items() if value}
    path = Path(source).expanduser()
    sources, held_out = named_or_path(source, data_dir, **local)
    if local and not path.exists():
        raise UsageError(
            f"--{next(iter(local))} goes with files of your own; '{source}' says in "
            "configs/corpora.yaml what it is."
        )
    if field and path.is_file() and kind_of(path) not in JSONL + PARQUET:
        raise UsageError(
            f"--field goes with JSON lines and Parquet ({', '.join(JSONL + PARQUET)}); "
            f"{path.name} would be read as plain text."
        )
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--out {out} lies inside of its own source {source}: choose another.")
    options = default_options(sources, held_out)
    if share is not None:
        options = PrepareOptions(validation=share, seed=options.seed)
    encoder = load_encoder(tokenizer)
    display = ProgressDisplay(sources.size)
    try:
        index = prepare(
            sources,
            encoder,
            out,
            options,
            workers=worker_count(workers, sources),
            on_error=on_error,
            progress=display.progress,
            before_writing=lambda: copy_tokenizer(tokenizer, out),
        )
    finally:
        display.close()
    return PreparedCorpus(out, index)


def verify_corpus(folder: Path) -> CheckedCorpus:
    """Check every byte against the index. Raises `EnvironmentFault` without an index."""
    index, faults = corpus_faults(folder)
    return CheckedCorpus(folder, index, tuple(faults))


def default_options(sources: Sources, held_out: HeldOut | None) -> PrepareOptions:
    """The options where none are given: the catalogue's rule for held-out documents, if it has
    one.
    """
    share: float = held_out.fraction if held_out else 0.0 if sources.validation else VALIDATION
    return PrepareOptions(validation=share, seed=held_out.seed if held_out else 0)


def worker_count(requested: int | None, sources: Sources) -> int:
    """How many processes tokenize."""
    if requested is not None:
        return requested
    return 1 if sources.size is not None and sources.size < ONE_WORKER_BELOW else default_workers()


def description(folder: Path, index: Index) -> list[str]:
    """Lines that describe a finished corpus."""
    lines = [f"{folder}:"]
    for name, split in index.splits.items():
        ratio = f", {split.bytes / split.tokens:.2f} bytes a token" if split.tokens else ""
        lines.append(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.bytes:,} bytes of text{ratio}, "
            f"{len(split.shards)} shard{'s' * (len(split.shards) != 1)}"
        )
    omitted = [
        f"{index.counts[cause]:,} {text}"
        for cause, text in LEFT_OUT.items()
        if index.counts.get(cause)
    ]
    return [*lines, f"  left out: {', '.join(omitted)}"] if omitted else lines


class ProgressDisplay:
    """On a terminal a bar with the rate and the remaining time; elsewhere a line a minute."""

    def __init__(self, total: int | None) -> None:
        self.total, self.began, self.printed = total, time.monotonic(), time.monotonic()
        self._bars: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("preparing"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[facts]}"),
            )
            self._bars = Bars(
                *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
            )
            self._bars.start()
            self._bars.add_task("preparing", total=total, facts="")

    @property
    def progress(self) -> Progress:
        """The callback for `prepare`."""
        return self._show

    def _show(self, counts: dict[str, int]) -> None:
        seconds = max(1e-9, time.monotonic() - self.began)
        facts = (
            f"{counts['documents']:,} documents  {counts['tokens'] / seconds:,.0f} tokens/s  "
            f"{counts['bytes'] / seconds / 1e6:.1f} MB/s"
        )
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=counts["bytes"], facts=facts)
        elif time.monotonic() - self.printed > 60:
            self.printed = time.monotonic()
            remaining = ""
            if self.total and counts["bytes"]:
                rest = max(0, self.total - counts["bytes"]) / counts["bytes"]
                remaining = f", about {seconds * rest / 60:.0f} min left"
            print(f"preparing: {facts}{remaining}", file=sys.stderr)

    def close(self) -> None:
        """Remove the bar."""
        if self._bars is not None:
            self._bars.stop()
