"""Tokenizing on the fly: from the source's text to batches of tensors, through the feeder's
processes and the stream that grows, beside the bare tokenizer in as many processes on the same
texts.

By the clock, from when the first shard is there (processes have started, the tokenizer is loaded)
to the end of the corpus; whatever the feeder may have in the making at that moment is not counted.
The bare processes have tokenized a text before they are timed. The feeder has a process more, which
reads, hashes and writes, and the reader is this one. GPT-2's tokenizer from FINREPRO_DATA_DIR, else
a trained one; WikiText-2's paragraphs, three times for each process, each time with a number before
it, so that none is a duplicate. On a machine that does other work the ratios of single rounds
scatter.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from finrepro.runtime import process

process.quiet_environment()
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process, a core

import torch  # noqa: E402
from _measure import ratios, sized, write  # noqa: E402
from _text import bare, gpt2_tokenizer, paragraphs, texts_of  # noqa: E402

from finrepro import PROJECT  # noqa: E402
from finrepro.data.arriving.arriving import ArrivingWindows  # noqa: E402
from finrepro.data.arriving.growing import open_arriving  # noqa: E402
from finrepro.data.batches import end_to_end  # noqa: E402
from finrepro.data.corpora.index import FORMAT, Unfinished, write_record  # noqa: E402
from finrepro.data.preparing import underway  # noqa: E402
from finrepro.data.preparing.prepare import PrepareOptions, Sources  # noqa: E402
from finrepro.data.preparing.sources import LocalFiles  # noqa: E402
from finrepro.data.preparing.tokenizing import load_encoder  # noqa: E402
from finrepro.data.preparing.writer import PREPARING  # noqa: E402
from finrepro.settings import plain  # noqa: E402

PROCESSES, ROUNDS, SEQUENCE, BATCH = sized(((1, 2, 4), 5, 1024, 8), ((1,), 1, 16, 2))
SHARD, BLOCK, CHUNK = sized((2**17, 32, 1 << 18), (2**10, 4, 1 << 12))
COPIES = 3
IN_A_BATCH = sized(62_000, 0)  # tokens of a quarter of a megabyte of text
_bare: Any = None


def load(folder: str) -> None:
    """A bare process's beginning."""
    global _bare
    os.nice(5)  # as the feeder
    _bare = bare(Path(folder))


def count(texts: list[str]) -> int:
    """Tokens of a chunk, by the library's own call."""
    return sum(map(len, _bare(texts, add_special_tokens=False)["input_ids"]))


def bare_rate(tokenizer: Path, texts: list[str], processes: int) -> float:
    """Tokens a second of a pool of bare tokenizers, texts going in and a number coming out."""
    chunks: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size >= CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append(text)
        size += len(text)
    with multiprocessing.get_context("spawn").Pool(processes, load, (str(tokenizer),)) as pool:
        pool.map(count, [["warm up"]] * 8 * processes, 1)
        began = time.perf_counter()
        tokens = sum(pool.imap(count, chunks))
        return tokens / (time.perf_counter() - began)


def fed_rate(tokenizer: Path, source: Path, folder: Path, processes: int) -> dict[str, float]:
    """Tokens a second that this process gets as tensors while a feeder of so many tokenizing
    processes prepares them.
    """
    (folder / PREPARING).mkdir(parents=True)
    encoder, sources = load_encoder(tokenizer), Sources([LocalFiles(source)])
    note = Unfinished(
        format=FORMAT,
        tokenizer=encoder.digest,
        vocabulary=encoder.vocabulary,
        source=sources.description,
        options=plain(PrepareOptions(validation=0.0, shard_tokens=SHARD)),
    )
    write_record(folder / PREPARING / underway.OPTIONS, plain(note))
    command = [
        sys.executable,
        "-m",
        "finrepro.data.arriving.feeder",
        str(source),
        "--tokenizer",
        str(tokenizer),
        "--out",
        str(folder),
        "--workers",
        str(processes),
        "--parent",
        str(os.getpid()),
    ]
    feeder = subprocess.Popen(command, cwd=PROJECT)
    stream = open_arriving(folder).stream()
    stream.reaches(1)
    began = (folder / PREPARING / "train-00000.json").stat().st_mtime
    prepared_before = SHARD + (2 * processes + 1) * IN_A_BATCH
    windows = ArrivingWindows(stream, SEQUENCE, BLOCK)
    read = step = 0
    while stream.reaches((step + 1) * BATCH * SEQUENCE + 1):
        read += end_to_end([windows[row] for row in windows.rows(step, BATCH, 0)]).input_ids.numel()
        step += 1
    seconds = time.time() - began
    feeder.wait()
    waited = stream.watch.seconds if hasattr(stream, "watch") else 0.0
    return {
        "tokens_per_second": (read - prepared_before) / seconds,
        "share_waited": min(1.0, waited / seconds),
    }


def main() -> None:
    """Each number of processes: both ways in turn."""
    torch.set_num_threads(1)
    began, by_processes = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        once = [text for text in texts_of(paragraphs(folder)) if text.strip()]
        tokenizer = gpt2_tokenizer(folder, once)
        for processes in PROCESSES:
            texts = [f"{copy} {text}" for copy in range(COPIES * processes) for text in once]
            source = folder / f"{processes}.jsonl"
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            rounds: dict[str, list[Any]] = {"bare": [], "fed": []}
            for turn in range(ROUNDS):
                rounds["bare"].append(bare_rate(tokenizer, texts, processes))
                rounds["fed"].append(
                    fed_rate(tokenizer, source, folder / f"c{processes}-{turn}", processes)
                )
            rates = [fed["tokens_per_second"] for fed in rounds["fed"]]
            by_processes[str(processes)] = {
                "rounds": rounds,
                "bare_tokens_per_second": statistics.median(rounds["bare"]),
                "tokens_per_second": statistics.median(rates),
                "of_bare_tokenizer": ratios(
                    [1 / rate for rate in rounds["bare"]], [1 / rate for rate in rates]
                ),
            }
    summary = {
        processes: {key: value for key, value in result.items() if key != "rounds"}
        for processes, result in by_processes.items()
    }
    write(
        "streaming",
        {
            "by_processes": by_processes,
            "summary": {**summary, "took_seconds": time.monotonic() - began},
        },
    )


if __name__ == "__main__":
    main()
