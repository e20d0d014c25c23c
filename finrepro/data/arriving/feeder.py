"""`python -m finrepro.data.arriving.feeder`: prepares a corpus while a cell is trained on it, and
ends with that cell's process.

Options are those of the folder's unfinished preparation, else the catalogue's. The tokenizer is
copied beside the shards before the first one is written. Standard error is a log; the reason of a
failure, in one line, goes to standard output.
"""

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path

from finrepro.data.corpora.folders import copy_tokenizer
from finrepro.data.preparing import command, underway
from finrepro.data.preparing.entries import named_or_path
from finrepro.data.preparing.prepare import PrepareOptions, prepare
from finrepro.data.preparing.tokenizing import load_encoder
from finrepro.errors import FinreproError
from finrepro.runtime import process
from finrepro.settings import build


def feed(name: str, tokenizer: Path, out: Path, data_dir: Path | None, workers: int) -> None:
    """Prepare the corpus, or resume, with at most `workers` tokenizing processes."""
    sources, held_out = named_or_path(name, data_dir)
    unfinished = underway.unfinished(out)
    options = (
        build(PrepareOptions, unfinished.options, str(out))
        if unfinished
        else command.default_options(sources, held_out)
    )
    if sources.size is not None and sources.size < command.ONE_WORKER_BELOW:
        workers = 1
    display = command.ProgressDisplay(sources.size)
    prepare(
        sources,
        load_encoder(tokenizer),
        out,
        options,
        workers=workers,
        progress=display.progress,
        before_writing=lambda: copy_tokenizer(tokenizer, out),
    )


def main(arguments: list[str] | None = None) -> int:
    """Feed until the corpus is finished; the exit codes are those of every command."""
    parser = argparse.ArgumentParser(
        prog="python -m finrepro.data.arriving.feeder",
        description="Prepare a corpus for a running cell.",
    )
    parser.add_argument("corpus")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="the cell's process id")
    options = parser.parse_args(arguments)
    process.die_with_parent()
    if os.getppid() != options.parent:  # it died before the kernel was told
        return 1
    # The terminal sends SIGINT to every process; the cell decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no half-written shard
    os.nice(5)  # where cores are few, training goes first
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process, a core: the rest is the training's
    try:
        feed(options.corpus, options.tokenizer, options.out, options.data_dir, options.workers)
    except underway.Locked:
        return underway.LOCKED
    except FinreproError as error:
        print(" ".join(str(error).split()), flush=True)
        return error.exit_code
    except Exception as error:  # a defect: the traceback for the log, a line for the cell
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return 4
    return 0


if __name__ == "__main__":
    process.end(main())
