"""The data engine: packing, loading, preparing and resuming, each against the plain way to do it,
and how full bins and windows are.

Baselines, side by side in one process: first fit by looking at every bin; a Hugging Face dataset of
rows, and a plain list, with a collator; the bare tokenizer on the same texts; an iterator that is
run up to the position. GPT-2's tokenizer from FINREPRO_DATA_DIR, else a trained one. One core;
`seconds` are of CPU time, which a busy machine does not change much, but for the resuming, whose
are of the clock.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from finrepro.kinds import kind_module
from finrepro.runtime import process

process.quiet_environment()
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # rates are of one core

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _measure import interleaved, ratios, sized, write  # noqa: E402
from _text import bare, data_dir, gpt2_tokenizer, paragraphs, texts_of  # noqa: E402

from finrepro.catalogue import reader  # noqa: E402
from finrepro.data import files, packing  # noqa: E402
from finrepro.data.batches import end_to_end  # noqa: E402
from finrepro.data.corpora.index import FORMAT, INDEX, Index, dtype_for, write_record  # noqa: E402
from finrepro.data.corpora.stream import open_corpus  # noqa: E402
from finrepro.data.corpora.windows import Windows  # noqa: E402
from finrepro.data.preparing import tokenizing  # noqa: E402
from finrepro.data.preparing.prepare import PrepareOptions, Sources, prepare  # noqa: E402
from finrepro.data.preparing.writer import PREPARING, SplitWriter  # noqa: E402
from finrepro.data.tokens import encode  # noqa: E402
from finrepro.settings import plain  # noqa: E402

CAPACITY, REPEATS, SEQUENCE, BATCH, STEPS = sized((2048, 5, 1024, 8, 200), (2048, 1, 16, 2, 3))
LENGTHS, FEW_LENGTHS = sized((1_000_000, 10_000), (1000, 100))
RANDOM_TOKENS, SHARD = sized((20_100_000, 2**22), (20_000, 2**12))


def seconds_of(
    run: Callable[[], object],
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.process_time,
) -> list[float]:
    return interleaved({"run": run}, repeats, clock)["run"]


def packer() -> dict[str, Any]:
    """A million lengths as fine-tuning sets have them, and the naive packer on as many as it can
    take.
    """
    lengths = (
        np.clip(np.random.default_rng(0).lognormal(4.3, 0.7, LENGTHS), 8, CAPACITY)
        .astype(int)
        .tolist()
    )
    few = lengths[:FEW_LENGTHS]

    def naive() -> list[list[int]]:
        room: list[int] = []
        content: list[list[int]] = []
        for row in sorted(range(len(few)), key=lambda row: -few[row]):
            fits = next((k for k, free in enumerate(room) if free >= few[row]), None)
            if fits is None:
                fits = len(room)
                room.append(CAPACITY)
                content.append([])
            room[fits] -= few[row]
            content[fits].append(row)
        return content

    packed = packing.bins(list(range(len(lengths))), lengths, CAPACITY)
    small = interleaved(
        {"naive": naive, "ours": lambda: packing.bins(list(range(len(few))), few, CAPACITY)},
        REPEATS,
        time.process_time,
    )
    return {
        "lengths": len(lengths),
        "seconds": seconds_of(lambda: packing.bins(list(range(len(lengths))), lengths, CAPACITY)),
        "useful_token_share": sum(lengths) / (CAPACITY * len(packed)),
        "ten_thousand": small,
        "times_faster_than_naive_at_ten_thousand": ratios(small["naive"], small["ours"]),
    }


def random_corpus(folder: Path, tokens: int) -> Path:
    """Documents of about a thousand random tokens."""
    (folder / PREPARING).mkdir(parents=True)
    writer = SplitWriter(folder, "train", "uint16", SHARD)
    generator = np.random.default_rng(0)
    while writer._position < tokens:
        ids = generator.integers(1, 50257, int(generator.lognormal(6.5, 0.8)) + 2).astype(np.uint16)
        ids[0] = 50256
        writer.add(bytes(16), len(ids) * 4, ids)
    index = Index(
        format=FORMAT,
        tokenizer="0" * 64,
        vocabulary=50257,
        start_id=50256,
        dtype=dtype_for(50257),
        shard_tokens=SHARD,
        splits={"train": writer.finish()},
        source={},
        options={},
        counts={},
    )
    write_record(folder / INDEX, plain(index))
    return folder


def loader(folder: Path) -> dict[str, Any]:
    """Batches of 8 windows of 1,024 tokens in training's order, as tensors, by one core."""
    import datasets
    from transformers import default_data_collator

    torch.set_num_threads(1)
    windows = Windows(open_corpus(folder).stream(), SEQUENCE)
    count = min(len(windows), 4096)
    rows = [windows[row].ids.tolist() for row in range(count)]
    table = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    order = np.random.default_rng(0).integers(0, count, (STEPS, BATCH)).tolist()

    def ours() -> None:
        for step in range(STEPS):
            end_to_end([windows[row] for row in windows.rows(step, BATCH, 0)])

    def hugging_face() -> None:
        for rows in order:
            default_data_collator([table[row] for row in rows])

    def plain_list() -> None:
        for batch in order:
            ids = torch.tensor([rows[row] for row in batch])
            ids.clone()  # the labels

    seconds = interleaved(
        {"ours": ours, "datasets_and_collator": hugging_face, "plain_list": plain_list},
        REPEATS,
        time.process_time,
    )
    tokens = SEQUENCE * BATCH * STEPS
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": {
            name: tokens / statistics.median(times) for name, times in seconds.items()
        },
        "times_faster_than_datasets": ratios(seconds["datasets_and_collator"], seconds["ours"]),
    }


def preparing(tokenizer_folder: Path, folder: Path) -> dict[str, Any]:
    """WikiText-2's paragraphs: all of the preparation, and the library's own call on a list of
    the same texts.
    """
    files = paragraphs(folder)
    sources, texts = Sources(files), texts_of(files)
    encoder = tokenizing.load_encoder(tokenizer_folder)
    tokenizer = bare(tokenizer_folder)
    fresh: Iterator[int] = itertools.count()

    def prepare_all() -> None:
        # No word is cached from the round before.
        tokenizing.tokenizer_of(encoder.definition).model._clear_cache()
        prepare(sources, encoder, folder / f"c{next(fresh)}", PrepareOptions())

    runs: dict[str, Callable[[], object]] = {
        "bare_tokenizer": lambda: tokenizer(texts, add_special_tokens=False)["input_ids"],
        "prepare": prepare_all,
    }
    seconds = interleaved(runs, REPEATS, time.process_time)
    ids = np.zeros(200, np.uint32)
    # Reading, hashing and writing alone.
    with mock.patch.object(tokenizing, "encode_texts", lambda _, __, texts: [ids] * len(texts)):
        seconds["prepare_without_tokenizing"] = seconds_of(prepare_all)
    size = sum(len(text.encode()) for text in texts)
    return {
        "documents": len(texts),
        "bytes": size,
        "seconds": seconds,
        "megabytes_per_second": {
            name: size / 1e6 / statistics.median(times) for name, times in seconds.items()
        },
        "times_as_fast_as_the_bare_tokenizer": ratios(
            seconds["bare_tokenizer"], seconds["prepare"]
        ),
    }


def resuming(folder: Path) -> dict[str, Any]:
    """From nothing to the batch at half a million samples of a million, and an iterator run up
    to there.
    """
    length = 20
    steps = len(Windows(open_corpus(folder).stream(), length)) // BATCH
    at = steps // 2

    def ours() -> Any:
        windows = Windows(open_corpus(folder).stream(), length)
        return [windows[row] for row in windows.rows(at, BATCH, 0)]

    def skipping() -> Any:
        windows = Windows(open_corpus(folder).stream(), length)
        order = np.random.default_rng(0).permutation(len(windows)).tolist()
        samples = (windows[row] for row in order)
        return list(itertools.islice(samples, at * BATCH, (at + 1) * BATCH))

    seconds = {
        "ours": seconds_of(ours, clock=time.perf_counter),
        "skipping": seconds_of(skipping, sized(2, 1), time.perf_counter),
    }
    return {
        "samples": steps * BATCH,
        "position": at * BATCH,
        "seconds": seconds,
        "times_faster": statistics.median(seconds["skipping"]) / statistics.median(seconds["ours"]),
    }


def fullness(tokenizer: Any) -> dict[str, Any]:
    """Real tokens over the room of an epoch's bins of 2,048, for the training split of every set
    that is here.

    `at_best`: what the smallest number of bins would give that these tokens fit in; in a small set
    the last bin shows.
    """
    tokenizer.model_max_length = 10**9
    by_task: dict[str, Any] = {}
    for name, entry in reader.entries("tasks").items():
        template = next(iter(entry.get("templates") or {}), "")
        spec = reader.task(name, template)
        if files.dataset_missing_reason(spec.dataset, data_dir(), ("train",)):
            continue
        module, config = kind_module("tasks", spec.task.kind), spec.task.config
        splits = files.load(spec.dataset, data_dir(), ("train", "development")).splits
        train = splits["train"][: sized(None, 100)]
        pairs = [
            (module.prompt(example, config), module.target(example, config)) for example in train
        ]
        lengths = [len(row.ids) for row in encode(tokenizer, pairs, CAPACITY, end=True)]
        bins = packing.bins(list(range(len(lengths))), lengths, CAPACITY)
        by_task[name] = {
            "examples": len(lengths),
            "share": sum(lengths) / (CAPACITY * len(bins)),
            "bins": len(bins),
            "at_best": sum(lengths) / (CAPACITY * -(-sum(lengths) // CAPACITY)),
        }
    return by_task


def running_text(corpora: Path) -> dict[str, Any]:
    """The same for windows of prepared text, and how many of their positions learn something."""
    windows = Windows(open_corpus(corpora).stream(), SEQUENCE)
    inputs = sum(windows.lengths)
    return {
        "share": inputs / (len(windows) * SEQUENCE),
        "supervised": windows.num_supervised / inputs,
    }


def main() -> None:
    """Every part of the engine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = gpt2_tokenizer(folder, texts_of(paragraphs(folder)))
        random = random_corpus(folder / "random", RANDOM_TOKENS)
        began = time.monotonic()
        result = {
            "packer": packer(),
            "loader": loader(random),
            "preparing": preparing(tokenizer, folder),
            "resuming": resuming(random),
            "bins_of_2048": fullness(bare(tokenizer)),
            "running_text": running_text(folder / "c0"),
        }
    summary = {
        "pack_a_million_seconds": statistics.median(result["packer"]["seconds"]),
        "loader_tokens_per_second": result["loader"]["tokens_per_second"],
        "prepare_of_bare_tokenizer": result["preparing"]["times_as_fast_as_the_bare_tokenizer"][
            "median"
        ],
        "prepare_megabytes_per_second": result["preparing"]["megabytes_per_second"],
        "resume_seconds": statistics.median(result["resuming"]["seconds"]["ours"]),
        "resume_times_faster": result["resuming"]["times_faster"],
        "bins_of_2048": {
            name: [round(bins["share"], 4), round(bins["at_best"], 4)]
            for name, bins in result["bins_of_2048"].items()
        },
        "running_text": result["running_text"],
        "took_seconds": time.monotonic() - began,
    }
    write("data", {**result, "summary": summary})


if __name__ == "__main__":
    main()
