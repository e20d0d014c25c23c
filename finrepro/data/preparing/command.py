"""What `invoke data --prepare` and `--verify` do: options checked, progress shown, the outcome
said.
"""

import sys
import time
from pathlib import Path
from typing import Any

from finrepro.data.corpora.folders import copy_tokenizer
from finrepro.data.corpora.index import Index
from finrepro.data.preparing.entries import HeldOut, named_or_path
from finrepro.data.preparing.prepare import Options, Progress, Sources, default_workers, prepare
from finrepro.data.preparing.tokenizing import load_encoder
from finrepro.data.preparing.verify import wrong_shards
from finrepro.errors import UsageError
from finrepro.settings import build

LITTLE = 16_000_000  # bytes that one process has tokenized before several have begun
VALIDATION = 0.005  # of the documents, where nothing else is said


def one_of(prepare: str, verify: str | None) -> None:
    """Raise `UsageError` for both at once, and for a folder to verify that has no name (a
    variable that was not set).
    """
    if prepare and verify is not None:
        raise UsageError("--prepare and --verify are two commands: give one of them.")
    if verify == "":
        raise UsageError("--verify needs the folder of a prepared corpus.")


def make(
    given: str,
    tokenizer: Path | None,
    out: Path | None,
    data_dir: Path | None,
    *,
    workers: str,
    on_error: str,
    field: str,
    documents: str,
    validation: str,
) -> int:
    """Prepare a corpus, or go on with it. Options are as they were typed, empty where they were
    not.
    """
    if tokenizer is None or out is None:
        raise UsageError("--prepare needs --tokenizer FOLDER and --out FOLDER.")
    local = {key: value for key, value in (("field", field), ("documents", documents)) if value}
    sources, held_out = named_or_path(given, data_dir, **local)
    if local and not Path(given).expanduser().exists():
        raise UsageError(
            f"--{next(iter(local))} goes with files of your own; '{given}' says in configs/corpora.yaml what it is."
        )
    if Path(given).expanduser().is_dir() and out.resolve().is_relative_to(
        Path(given).expanduser().resolve()
    ):
        raise UsageError(f"--out {out} lies inside of its own source {given}: choose another.")
    options = _options(validation, sources, held_out)
    encoder = load_encoder(tokenizer)
    shown = Shown(sources.size)
    try:
        index = prepare(
            sources,
            encoder,
            out,
            options,
            workers=_workers(workers, sources),
            on_error=on_error,
            progress=shown.progress,
            keep=lambda: copy_tokenizer(tokenizer, out),
        )
    finally:
        shown.close()
    print("\n".join(described(out, index)))
    return 0


def default_options(sources: Sources, held_out: HeldOut | None) -> Options:
    """The options where nothing is said: the catalogue's rule for held-out documents, if it has
    one.
    """
    fraction: float = held_out.fraction if held_out else 0.0 if sources.validation else VALIDATION
    return Options(validation=fraction, seed=held_out.seed if held_out else 0)


def _options(validation: str, sources: Sources, held_out: HeldOut | None) -> Options:
    options = default_options(sources, held_out)
    if not validation:
        return options
    try:
        fraction = float(validation)
    except ValueError:
        raise UsageError(
            f"--validation '{validation}': expected a fraction from 0 to below 1, as 0.005."
        ) from None
    return build(Options, {"validation": fraction, "seed": options.seed}, "--validation")


def _workers(given: str, sources: Sources) -> int:
    if given and (not given.isdecimal() or int(given) < 1):
        raise UsageError(f"--workers '{given}': expected a whole number from 1.")
    if given:
        return int(given)
    return 1 if sources.size is not None and sources.size < LITTLE else default_workers()


def described(folder: Path, index: Index) -> list[str]:
    """A finished corpus in lines."""
    lines = [f"{folder}:"]
    for name, split in index.splits.items():
        ratio = f", {split.bytes / split.tokens:.2f} bytes a token" if split.tokens else ""
        lines.append(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes of text{ratio}, "
            f"{len(split.shards)} shard{'s' * (len(split.shards) != 1)}"
        )
    counts = index.counts
    left = [f"{counts[what]:,} {said}" for what, said in _LEFT_OUT.items() if counts.get(what)]
    return [*lines, f"  left out: {', '.join(left)}"] if left else lines


_LEFT_OUT = {
    "duplicates": "duplicates",
    "empty": "empty",
    "quarantined": "damaged (quarantine.jsonl)",
}


def verify(folder: Path) -> int:
    """Check every byte; name what is wrong. 4 when anything is, else 0."""
    index, wrong = wrong_shards(folder)
    for line in wrong:
        print(f"damaged: {line}")
    print("\n".join(described(folder, index)))
    print(
        f"{sum(len(split.shards) for split in index.splits.values())} shards, {len(wrong)} damaged"
    )
    return 4 if wrong else 0


class Shown:
    """A bar with the rate and the time that is left on a terminal; elsewhere a line a minute."""

    def __init__(self, total: int | None) -> None:
        self.total, self.began, self.said = total, time.monotonic(), time.monotonic()
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
        """What `prepare` calls."""
        return self._show

    def _show(self, done: dict[str, int]) -> None:
        seconds = max(1e-9, time.monotonic() - self.began)
        facts = (
            f"{done['documents']:,} documents  {done['tokens'] / seconds:,.0f} tokens/s  "
            f"{done['bytes'] / seconds / 1e6:.1f} MB/s"
        )
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=done["bytes"], facts=facts)
        elif time.monotonic() - self.said > 60:
            self.said = time.monotonic()
            left = ""
            if self.total and done["bytes"]:
                left = f", about {seconds * max(0, self.total - done['bytes']) / done['bytes'] / 60:.0f} min left"
            print(f"preparing: {facts}{left}", file=sys.stderr)

    def close(self) -> None:
        """Take the bar away."""
        if self._bars is not None:
            self._bars.stop()
