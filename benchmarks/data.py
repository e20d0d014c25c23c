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

from finrepro.kinds import kind_module
from finrepro.runtime import process

process.quiet_environment()
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # rates are of one core

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _measure import interleaved, ratios, write  # noqa: E402
from _text import bare, paragraphs  # noqa: E402

from finrepro.catalogue import reader  # noqa: E402
from finrepro.data import files, packing  # noqa: E402
from finrepro.data.batches import end_to_end  # noqa: E402
from finrepro.data.corpora.index import FORMAT, INDEX, Index, dtype_for, write_record  # noqa: E402
from finrepro.data.corpora.stream import open_corpus  # noqa: E402
from finrepro.data.corpora.windows import Windows  # noqa: E402
from finrepro.data.preparing import tokenizing  # noqa: E402
from finrepro.data.preparing.entries import sources_of  # noqa: E402
from finrepro.data.preparing.prepare import PrepareOptions, Sources, prepare  # noqa: E402
from finrepro.data.preparing.writer import PREPARING, SplitWriter  # noqa: E402
from finrepro.data.tokens import encode, train_tokenizer  # noqa: E402
from finrepro.settings import plain  # noqa: E402

CAPACITY, REPEATS, SEQUENCE, BATCH, STEPS = 2048, 5, 1024, 8, 200


def seconds_of(
    run: Callable[[], object],
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.process_time,
) -> list[float]:
    return interleaved({"it": run}, repeats, clock)["it"]


def packer() -> dict[str, Any]:
    """A million lengths as fine-tuning sets have them, and the naive packer on as many as it can
    take.
    """
    lengths = (
        np.clip(np.random.default_rng(0).lognormal(4.3, 0.7, 1_000_000), 8, CAPACITY)
        .astype(int)
        .tolist()
    )
    few = lengths[:10_000]

    def naive() -> list[list[int]]:
        room: list[int] = []
        content: list[list[int]] = []
        for row in sorted(range(len(few)), key=lambda row: -few[row]):
            fits = next((k for k, left in enumerate(room) if left >= few[row]), None)
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
    writer = SplitWriter(folder, "train", "uint16", 2**22)
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
        shard_tokens=2**22,
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
        for chosen in order:
            ids = torch.tensor([rows[row] for row in chosen])
            ids.clone()  # the labels

    found = interleaved(
        {"ours": ours, "datasets_and_collator": hugging_face, "plain_list": plain_list},
        REPEATS,
        time.process_time,
    )
    tokens = SEQUENCE * BATCH * STEPS
    return {
        "tokens": tokens,
        "seconds": found,
        "tokens_per_second": {
            name: tokens / statistics.median(times) for name, times in found.items()
        },
        "times_faster_than_datasets": ratios(found["datasets_and_collator"], found["ours"]),
    }


def preparing(tokenizer_folder: Path, folder: Path) -> dict[str, Any]:
    """WikiText-2's paragraphs: the whole preparation, and the library's own call on a list of
    the same texts.
    """
    sources = Sources(paragraphs())
    texts = [document.text for each in sources.train for _, document in each.read(print)]  # type: ignore[arg-type]
    encoder = tokenizing.load_encoder(tokenizer_folder)
    tokenizer = bare(tokenizer_folder)
    fresh: Iterator[int] = itertools.count()

    def whole() -> None:
        tokenizing.tokenizer_of(
            encoder.definition
        ).model._clear_cache()  # no word is known from the round before
        prepare(sources, encoder, folder / f"c{next(fresh)}", PrepareOptions())

    runs = {
        "bare_tokenizer": lambda: tokenizer(texts, add_special_tokens=False)["input_ids"],
        "prepare": whole,
    }
    found = interleaved(runs, REPEATS, time.process_time)
    encode_texts, ids = tokenizing.encode_texts, np.zeros(200, np.uint32)
    tokenizing.encode_texts = lambda _, __, given: (
        [ids] * len(given)
    )  # reading, hashing and writing alone
    found["prepare_without_tokenizing"] = seconds_of(runs["prepare"])
    tokenizing.encode_texts = encode_texts
    size = sum(len(text.encode()) for text in texts)
    return {
        "documents": len(texts),
        "bytes": size,
        "seconds": found,
        "megabytes_per_second": {
            name: size / 1e6 / statistics.median(times) for name, times in found.items()
        },
        "times_as_fast_as_the_bare_tokenizer": ratios(found["bare_tokenizer"], found["prepare"]),
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

    found = {
        "ours": seconds_of(ours, clock=time.perf_counter),
        "skipping": seconds_of(skipping, 2, time.perf_counter),
    }
    return {
        "samples": steps * BATCH,
        "position": at * BATCH,
        "seconds": found,
        "times_faster": statistics.median(found["skipping"]) / statistics.median(found["ours"]),
    }


def fullness(tokenizer: Any, data_dir: Path | None) -> dict[str, Any]:
    """Real tokens over the room of an epoch's bins of 2,048, for the training split of every set
    that is here.

    `at_best`: what the smallest number of bins would give that these tokens fit in; in a small set
    the last bin shows.
    """
    tokenizer.model_max_length = 10**9
    found: dict[str, Any] = {}
    for name, entry in reader.entries("tasks").items():
        template = next(iter(entry.get("templates") or {}), "")
        spec = reader.task(name, template)
        if files.dataset_missing_reason(spec.dataset, data_dir, ("train",)):
            continue
        module, config = kind_module("tasks", spec.task.kind), spec.task.config
        train = files.load(spec.dataset, data_dir, ("train", "development")).splits["train"]
        pairs = [(module.prompt(each, config), module.target(each, config)) for each in train]
        lengths = [len(each.ids) for each in encode(tokenizer, pairs, CAPACITY, end=True)]
        bins = packing.bins(list(range(len(lengths))), lengths, CAPACITY)
        found[name] = {
            "examples": len(lengths),
            "share": sum(lengths) / (CAPACITY * len(bins)),
            "bins": len(bins),
            "at_best": sum(lengths) / (CAPACITY * -(-sum(lengths) // CAPACITY)),
        }
    return found


def running_text(corpora: Path) -> dict[str, Any]:
    """The same for windows of prepared text, and how many of their positions learn something."""
    windows = Windows(open_corpus(corpora).stream(), SEQUENCE)
    inputs = sum(windows.lengths)
    return {
        "share": inputs / (len(windows) * SEQUENCE),
        "supervised": windows.num_supervised / inputs,
    }


def main() -> None:
    given = os.environ.get("FINREPRO_DATA_DIR")
    data_dir = Path(given) if given else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = (data_dir or folder) / "gpt2_tokenizer"
        if not tokenizer.is_dir():
            texts = [
                document.text
                for each in sources_of("wikitext2", None).train
                for _, document in each.read(print)
            ]  # type: ignore[arg-type]
            train_tokenizer(texts, "gpt2", 8192).save_pretrained(tokenizer)
        random = random_corpus(folder / "random", 20_100_000)
        began = time.monotonic()
        result = {
            "packer": packer(),
            "loader": loader(random),
            "preparing": preparing(tokenizer, folder),
            "resuming": resuming(random),
            "bins_of_2048": fullness(bare(tokenizer), data_dir),
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
            name: [round(each["share"], 4), round(each["at_best"], 4)]
            for name, each in result["bins_of_2048"].items()
        },
        "running_text": result["running_text"],
        "took_seconds": time.monotonic() - began,
    }
    write("data", {**result, "summary": summary})


if __name__ == "__main__":
    main()
