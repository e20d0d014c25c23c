"""`python -m finrepro.data.arriving.feeder`: prepares a corpus for a cell that is trained on it
meanwhile, and ends with that cell's process.

Options are the catalogue's, or those that the folder was begun with; the tokenizer is copied beside
the shards before the first one. What happens goes to standard error, which is a log; the reason of
a failure, in one line, to standard output.
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
from finrepro.data.preparing.prepare import Options, prepare
from finrepro.data.preparing.tokenizing import load_encoder
from finrepro.errors import FinreproError
from finrepro.runtime import process
from finrepro.settings import build


def feed(name: str, tokenizer: Path, out: Path, data_dir: Path | None, workers: int) -> None:
    """Prepare the corpus, or go on with it, with at most so many tokenizing processes."""
    sources, held_out = named_or_path(name, data_dir)
    begun = underway.begun(out)
    options = (
        build(Options, begun.options, str(out))
        if begun
        else command.default_options(sources, held_out)
    )
    if sources.size is not None and sources.size < command.LITTLE:
        workers = 1
    display = command.ProgressDisplay(sources.size)
    prepare(
        sources,
        load_encoder(tokenizer),
        out,
        options,
        workers=workers,
        progress=display.progress,
        keep=lambda: copy_tokenizer(tokenizer, out),
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
    given = parser.parse_args(arguments)
    process.die_with_parent()
    if os.getppid() != given.parent:  # it died before the kernel was told
        return 1
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the terminal sends it to everybody; the cell decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no half-written shard
    os.nice(5)  # where cores are few, training goes first
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process, a core: the rest is the training's
    try:
        feed(given.corpus, given.tokenizer, given.out, given.data_dir, given.workers)
    except underway.Held:
        return underway.HELD
    except FinreproError as error:
        print(" ".join(str(error).split()), flush=True)
        return error.exit_code
    except Exception as error:  # a defect: all of it for the log, a line for the cell
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return 4
    return 0


if __name__ == "__main__":
    process.end(main())
