"""Law: a corpus that is read while it is being written gives what the finished one gives,
whoever writes it, however slowly, and whatever is killed; who waits for it is told in one line
when nobody will go on."""

import dataclasses
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.corpora import random_documents, stream_of
from fixtures.model import broken
from fixtures.process import environment, one_line
from numpy.typing import NDArray

from finrepro import PROJECT
from finrepro.catalogue import reader as catalogue
from finrepro.catalogue import resolve
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec, TrainSet
from finrepro.data import packing
from finrepro.data.arriving import growing
from finrepro.data.arriving.arriving import ArrivingWindows
from finrepro.data.arriving.growing import GrowingCorpus, Waiting, open_arriving
from finrepro.data.corpora.folders import copy_tokenizer, folder_of, unprepared_reason
from finrepro.data.corpora.index import Unfinished, read_index, write_record
from finrepro.data.corpora.mixture import Mixture
from finrepro.data.corpora.order import permute
from finrepro.data.corpora.stream import Corpus
from finrepro.data.corpora.windows import Windows
from finrepro.data.preparing import prepare, underway, writer
from finrepro.data.preparing.entries import sources_of
from finrepro.data.preparing.prepare import PrepareOptions, Sources
from finrepro.data.preparing.sources import LocalFiles
from finrepro.data.preparing.tokenizing import Encoder, load_encoder
from finrepro.data.tokens import train_tokenizer
from finrepro.errors import EnvironmentFault, Interrupted, Unavailable, UsageError
from finrepro.evaluation.tasks.language_modeling import Config
from finrepro.evidence.place import Place
from finrepro.evidence.store import open_store
from finrepro.planning import availability
from finrepro.running import feeding
from finrepro.running.cell import run_cell
from finrepro.running.text import open_corpora, while_waiting
from finrepro.runtime import ranks
from finrepro.settings import build, plain

CAPACITY, LENGTH, BLOCK, BATCH = 900, 16, 20, 8
OPTIONS = PrepareOptions(validation=0.1, shard_tokens=CAPACITY)
TEXTS = [
    f"document {k} says {' and '.join(str(k * n * 7919) for n in range(1, 2 + k % 13))} ."
    for k in range(300)
]

PREPARING = """
import json, sys
from pathlib import Path
from finrepro.data.preparing import writer
from finrepro.data.corpora.folders import copy_tokenizer
from finrepro.data.preparing.prepare import PrepareOptions, Sources, prepare
from finrepro.data.preparing.sources import LocalFiles
from finrepro.data.preparing.tokenizing import Encoder
from finrepro.errors import FinreproError
if __name__ == "__main__":
    encoder, tokenizer, lines, out, slow, workers = sys.argv[1:]
    tokenizer, lines, out = map(Path, (tokenizer, lines, out))
    plain = writer.SplitWriter._close_shard
    def slowly(self):
        if slow == "slow":
            print(self.name, flush=True)
            sys.stdin.readline()  # a shard a line
        plain(self)
    writer.SplitWriter._close_shard = slowly
    try:
        prepare(Sources([LocalFiles(lines, "lines")]), Encoder(**json.loads(encoder)), out,
                PrepareOptions(validation=0.1, shard_tokens=900), workers=int(workers),
                before_writing=lambda: copy_tokenizer(tokenizer, out))
    except FinreproError as error:
        sys.exit(error.exit_code)
"""

READING = """
import hashlib, sys
from pathlib import Path
from finrepro.data.arriving import growing
from finrepro.data.arriving.arriving import ArrivingWindows
stream = growing.open_arriving(Path(sys.argv[1])).stream()
windows = ArrivingWindows(stream, 16, 20)
seen = hashlib.sha256()
for step in range(int(sys.argv[2])):
    for row in windows.rows(step, 8, 3):
        seen.update(windows[row].ids.tobytes() + repr(windows[row].cuts).encode())
print(seen.hexdigest())
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, "gpt2", 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tokenizer: Path) -> Encoder:
    return load_encoder(tokenizer)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("in") / "lines.txt"
    path.write_text("".join(text + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def finished(
    lines: Path, tokenizer: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The corpus as it is when nobody reads it meanwhile."""
    folder = tmp_path_factory.mktemp("finished") / "corpus"
    prepared(lines, tokenizer, encoder, folder)
    return folder


def prepared(lines: Path, tokenizer: Path, encoder: Encoder, folder: Path) -> None:
    sources = Sources([LocalFiles(lines, "lines")])
    prepare.prepare(
        sources, encoder, folder, OPTIONS, before_writing=lambda: copy_tokenizer(tokenizer, folder)
    )


class Writer:
    """A process that prepares the corpus and closes a shard whenever somebody waits for one."""

    def __init__(
        self,
        arguments: tuple[Path, Path, Encoder],
        folder: Path,
        workers: int = 1,
        slow: bool = True,
        limit: int | None = None,
    ) -> None:
        self.arguments, self.folder, self.workers, self.slow, self.limit = (
            arguments,
            folder,
            workers,
            slow,
            limit,
        )
        self.waits = 0
        self.start()

    def start(self) -> None:
        lines, tokenizer, encoder = self.arguments
        arguments = [
            json.dumps(vars(encoder)),
            tokenizer,
            lines,
            self.folder,
            "slow" if self.slow else "fast",
            self.workers,
        ]

        def limited() -> None:
            if self.limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))

        self.process = subprocess.Popen(
            [sys.executable, "-c", PREPARING, *map(str, arguments)],
            env=environment(PYTHONPATH=str(PROJECT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=limited,
        )

    def release(self, _: str = "") -> bool:
        """Let it close a shard; what a reader calls while it waits."""
        self.waits += 1
        if self.process.poll() is None:
            assert self.process.stdin is not None and self.process.stdout is not None
            if self.slow and self.process.stdout.readline():
                self.process.stdin.write("\n")
                self.process.stdin.flush()
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def writing(lines: Path, tokenizer: Path, encoder: Encoder) -> Iterator[Callable[..., Writer]]:
    """`writing(folder, ...)`: a `Writer` that does not outlive the test."""
    writers: list[Writer] = []

    def begin(folder: Path, **options: Any) -> Writer:
        writers.append(Writer((lines, tokenizer, encoder), folder, **options))
        return writers[-1]

    yield begin
    for started in writers:
        started.kill()


def windows_of(
    folder: Path, waiting: Waiting = lambda _: False, kind: type[ArrivingWindows] = ArrivingWindows
) -> ArrivingWindows:
    return kind(open_arriving(folder, None, waiting).stream(), LENGTH, BLOCK)


def learned(windows: Windows, steps: int, first: int = 0, world_size: int = 1) -> str:
    """sha256 of what is learned from, put back in a step's order from each rank's part."""
    digest = hashlib.sha256()
    for step in range(first, steps):
        expected = windows.rows(step, BATCH, 3)
        shares = [
            packing.rank_rows(expected, windows.lengths, rank, world_size)
            for rank in range(world_size)
        ]
        by_row = {row: windows[row] for share in shares for row in share}
        assert all(len(by_row[row].ids) == windows.lengths[row] for row in expected)
        for row in expected:
            digest.update(by_row[row].ids.tobytes() + repr(by_row[row].cuts).encode())
    return digest.hexdigest()


def steps_of(folder: Path, epochs: float = 1.4) -> int:
    """So many that they end in the second epoch."""
    return int(epochs * len(windows_of(folder)) / BATCH)


# The same, whenever it is read.


class OfWhatIsThere(ArrivingWindows):
    """A mutant: permutes the windows that have arrived so far."""

    def order(self, positions: NDArray[np.int64], seed: int, part: int = 0) -> NDArray[np.int64]:
        self.stream.reaches(int(positions.max() + 1) * LENGTH + 1)
        available = (self.stream._length - 1) // LENGTH
        return permute(positions % available, available, (seed, part, 0))


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_what_is_learned_is_the_same_from_a_finished_corpus_and_from_one_that_is_being_written(
    workers: int, finished: Path, writing: Callable[..., Writer], tmp_path: Path
) -> None:
    steps = steps_of(finished)
    expected = learned(windows_of(finished), steps)
    writer = writing(tmp_path / "c", workers=workers)
    windows = windows_of(tmp_path / "c", writer.release)
    assert learned(windows, steps) == expected
    shards = len(read_index(tmp_path / "c").splits["train"].shards)
    assert shards > 5 and writer.waits >= shards, "the law needs a reader that is ahead"
    assert windows.stream.watch.seconds > 0  # type: ignore[attr-defined]


def the_order_does_not_depend_on_what_is_there(
    finished: Path, writer: Writer, kind: type[ArrivingWindows]
) -> None:
    steps = steps_of(finished, 0.8)
    assert learned(windows_of(writer.folder, writer.release, kind), steps) == learned(
        windows_of(finished, kind=kind), steps
    )


def test_an_order_over_what_has_arrived_so_far_is_found(
    finished: Path, writing: Callable[..., Writer], tmp_path: Path
) -> None:
    broken(
        the_order_does_not_depend_on_what_is_there, finished, writing(tmp_path / "a"), OfWhatIsThere
    )


def test_killed_again_and_again_the_writer_goes_on_and_its_reader_sees_nothing_of_it(
    finished: Path, writing: Callable[..., Writer], tmp_path: Path
) -> None:
    writer = writing(tmp_path / "c")

    def waiting(_: str) -> bool:
        if writer.waits in (2, 5):
            writer.kill()
            writer.start()
        return writer.release()

    steps = steps_of(finished)
    for world_size in (1, 2, 4, 8):  # the first one reads while it is written
        windows = windows_of(tmp_path / "c", waiting if world_size == 1 else lambda _: False)
        assert learned(windows, steps, 0, world_size) == learned(windows_of(finished), steps)
    writer.process.wait()
    assert not (tmp_path / "c" / writer_folder()).exists() and writer.waits > 6
    assert read_index(tmp_path / "c") == read_index(finished)


def writer_folder() -> str:
    return writer.PREPARING


def test_two_readers_follow_one_writer(
    finished: Path, writing: Callable[..., Writer], tmp_path: Path
) -> None:
    steps = steps_of(finished)
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READING, str(tmp_path / "c"), str(steps)],
            env=environment(PYTHONPATH=str(PROJECT)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    writing(tmp_path / "c", slow=False)
    messages = [reader.communicate(timeout=100)[0].strip() for reader in readers]
    assert messages == [learned(windows_of(finished), steps)] * 2


def test_a_late_step_is_there_at_once_and_asks_for_no_more_than_its_block(
    finished: Path, writing: Callable[..., Writer], tmp_path: Path
) -> None:
    """Resuming: what came before the step is not read, what comes after its block is not waited
    for.
    """
    writer = writing(tmp_path / "c")
    windows = windows_of(tmp_path / "c", writer.release)
    step = int(0.5 * len(windows_of(finished)) / BATCH)
    read: list[tuple[int, int]] = []
    plain_tokens = windows.stream.tokens
    windows.stream.tokens = lambda begin, end: read.append((begin, end)) or plain_tokens(begin, end)  # type: ignore[method-assign,func-returns-value]
    assert learned(windows, step + 1, step) == learned(windows_of(finished), step + 1, step)
    assert len(read) == BATCH
    assert (
        not windows.stream.finished
        and windows.stream.read_end <= (step * BATCH // BLOCK + 2) * BLOCK * LENGTH + 1
    )  # type: ignore[attr-defined]
    assert not underway.is_finished(tmp_path / "c")


def test_the_first_epoch_goes_through_blocks_and_later_ones_through_all_windows(
    tmp_path: Path,
) -> None:
    windows = ArrivingWindows(stream_of(tmp_path / "c", random_documents(0, 61)), 10, 8)
    plain_windows = Windows(windows.stream, 10)
    count = len(windows)
    assert count == len(plain_windows) and count % 8, "the law needs a last block that is shorter"
    drawn = [row for step in range(3 * count) for row in windows.rows(step, 1, 5)]
    for begin in range(0, count, 8):
        assert sorted(drawn[begin : begin + 8][: count - begin]) == list(
            range(begin, min(begin + 8, count))
        )
    assert drawn[:count] != sorted(drawn[:count])
    assert drawn[count:] == [
        row for step in range(count, 3 * count) for row in plain_windows.rows(step, 1, 5)
    ]
    together = windows.rows(0, count + 5, 5)
    assert together == drawn[: count + 5], "a step may lie in several blocks, and in two epochs"
    assert (
        list(windows.lengths) == list(plain_windows.lengths)
        and windows.num_supervised == plain_windows.num_supervised
    )
    assert [window.ids.tolist() for window in windows] == [
        window.ids.tolist() for window in plain_windows
    ]
    for row in (count, -count - 1):
        with pytest.raises(IndexError):
            windows[row]


def test_the_order_of_arrival_is_the_same_on_every_machine_and_in_every_version(
    tmp_path: Path,
) -> None:
    """A change here changes every pretraining run on a corpus that arrives: known values,
    computed once.
    """
    windows = ArrivingWindows(stream_of(tmp_path / "c", random_documents(0, 60)), 10, 8)
    assert windows.rows(0, 16, 0) == [1, 3, 2, 6, 4, 0, 7, 5, 9, 8, 13, 11, 10, 12, 14, 15]


def cut_off(
    lines: Path, tokenizer: Path, encoder: Encoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preparation that ends between its last shard and the index."""
    with monkeypatch.context() as context:
        context.setattr(prepare, "_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(lines, tokenizer, encoder, folder)


def test_the_last_shard_counts_when_the_corpus_is_finished(
    lines: Path,
    tokenizer: Path,
    encoder: Encoder,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A preparation that begins anew writes that shard again."""
    cut_off(lines, tokenizer, encoder, tmp_path / "c", monkeypatch)
    records = sorted((tmp_path / "c" / writer.PREPARING).glob("train-*.json"))
    opened = open_arriving(tmp_path / "c")
    assert isinstance(opened, GrowingCorpus) and len(opened.stream().shards) == len(records) - 1
    assert (
        len(opened.stream().tokens(0, CAPACITY)) == CAPACITY and opened.facts()["finished"] is False
    )
    shards = [shard.sha256_tokens for shard in read_index(finished).splits["train"].shards]
    assert opened.facts()["shards"] == shards[:1], "those that were read"
    assert (
        opened.facts(CAPACITY + 1)["shards"]
        == shards[:2]
        != opened.facts(CAPACITY)["shards"]
        == shards[:1]
    )
    prepared(lines, tokenizer, encoder, tmp_path / "c")
    assert len(opened.stream()) == read_index(finished).splits["train"].tokens
    finished_windows = open_arriving(tmp_path / "c")
    assert isinstance(finished_windows, Corpus) and opened.facts() == finished_windows.facts() | {
        "finished": True,
        "waited_seconds": 0.0,
    }
    assert opened.made_from() == finished_windows.made_from()


# Waiting in vain.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "PATIENCE_SECONDS", 0.2)


@pytest.mark.usefixtures("impatient")
def test_only_the_first_rank_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the others when it ends; what it has begun is not seen by them before the folder
    is held.
    """
    monkeypatch.setattr(ranks, "current", lambda: ranks.Ranks(1, 2, 1))
    watch = growing.Watch(tmp_path)
    for _ in range(5):
        watch.pause("text")
    assert watch.seconds > 0.4
    monkeypatch.undo()
    monkeypatch.setattr(growing, "PATIENCE_SECONDS", 0.2)
    with pytest.raises(EnvironmentFault, match="was killed, or never begun"):
        watch.pause("text")


@pytest.mark.usefixtures("impatient")
def test_who_waits_for_a_writer_that_was_killed_is_told_in_one_line(
    writing: Callable[..., Writer], tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentFault, match="was killed, or never begun") as nobody:
        open_arriving(tmp_path / "c")
    assert "invoke data --prepare" in one_line(nobody.value)
    writer = writing(tmp_path / "c")

    def waiting(_: str) -> bool:
        if writer.waits == 4 and writer.process.poll() is None:
            writer.kill()
        return writer.process.poll() is None and writer.release()

    windows = windows_of(tmp_path / "c", waiting)
    with pytest.raises(EnvironmentFault, match="the preparation has stopped") as caught:
        learned(windows, 10**6)
    assert one_line(caught.value) and not isinstance(caught.value, Unavailable), (
        "something was learned: the run is to go on"
    )


@pytest.mark.usefixtures("impatient")
def test_a_writer_whose_disk_is_full_leaves_its_reason_to_those_who_wait(
    finished: Path, writing: Callable[..., Writer], tmp_path: Path
) -> None:
    """A file of 1,500 bytes is all that there is room for: a shard has 1,800. So there is
    nothing to learn from: the cell is skipped.
    """
    first = writing(tmp_path / "c")
    assert first.process.stdout.readline(), "it has begun"
    first.kill()
    full = writing(tmp_path / "c", slow=False, limit=1500)
    assert full.process.wait(100) == 3
    windows = windows_of(tmp_path / "c")
    with pytest.raises(
        Unavailable, match="the preparation has stopped: no space left for"
    ) as caught:
        windows.rows(0, BATCH, 3)
    assert one_line(caught.value).endswith("run the same command again.")
    writing(tmp_path / "c", slow=False)
    assert learned(windows_of(tmp_path / "c", lambda _: True), 9) == learned(
        windows_of(finished), 9
    )


def test_a_corpus_that_is_replaced_or_mixed_while_it_is_written_is_refused(
    lines: Path,
    tokenizer: Path,
    encoder: Encoder,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_off(lines, tokenizer, encoder, tmp_path / "c", monkeypatch)
    windows = windows_of(tmp_path / "c")
    with pytest.raises(UsageError, match="mixture: the corpus 'a' is not finished") as mixed:
        Mixture({"a": windows, "b": windows}, {"a": 1, "b": 1})
    one_line(mixed.value)
    index = json.loads((finished / "index.json").read_text())
    for change in ({"source": {"train": [], "validation": []}}, {"shard_tokens": CAPACITY}):
        index["splits"]["train"]["shards"][0]["sha256_tokens"] = "0" * 64
        (tmp_path / "c" / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(EnvironmentFault, match="was replaced by another one"):
            len(windows.stream)
    finished_windows = windows_of(finished)
    assert (
        len(Mixture({"a": finished_windows, "b": finished_windows}, {"a": 1, "b": 1}).rows(0, 4, 0))
        == 4
    )


@pytest.mark.parametrize("kind", ["tokens", "starts"])
def test_a_shard_that_is_damaged_while_the_corpus_grows_is_never_read(
    kind: str,
    lines: Path,
    tokenizer: Path,
    encoder: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_off(lines, tokenizer, encoder, tmp_path / "c", monkeypatch)
    open_arriving(tmp_path / "c").stream()
    path = tmp_path / "c" / f"train-00000.{kind}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EnvironmentFault, match=rf"it is damaged: train-00000\.{kind}") as found:
        open_arriving(tmp_path / "c").stream()
    one_line(found.value)


def test_the_note_of_a_preparation_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / writer.PREPARING).mkdir()
    assert underway.unfinished(tmp_path / "elsewhere") is None
    for content in ("{", "[]", '{"format": 1}'):
        (tmp_path / writer.PREPARING / underway.OPTIONS).write_text(content)
        with pytest.raises(EnvironmentFault, match="is damaged: delete") as caught:
            underway.unfinished(tmp_path)
        one_line(caught.value)


# In a cell.


def cell(**changes: Any) -> RunSpec:
    """A miniature that is trained on WikiText-2 as it arrives."""
    label = "gpt2_1_5b_deep_mini-none-full-wikitext2_text-adamw-s0"
    spec_of_cell = resolve.spec_of_label(Selection(table="2"), "smoke", label)
    part = spec_of_cell.train_on.parts[0]
    config = dataclasses.replace(
        part.task.task.config, **{"corpus": "wikitext2", "order": "arriving", "block": 32} | changes
    )
    task = dataclasses.replace(part.task, task=dataclasses.replace(part.task.task, config=config))
    few = dataclasses.replace(
        spec_of_cell.train,
        max_steps=6,
        warmup_steps=1,
        global_batch_size=8,
        max_seq_len=128,
        max_tokens=512,
    )
    train_on = TrainSet(
        name=spec_of_cell.train_on.name, parts=(dataclasses.replace(part, task=task),)
    )
    evaluation = dataclasses.replace(spec_of_cell.evaluation, resamples=10)
    return dataclasses.replace(
        spec_of_cell, train_on=train_on, train=few, evaluation=evaluation, stored_as=()
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"corpus": "wikitext2", "windows": True}, "needs an order: shuffled or arriving"),
        ({"order": "shuffled", "windows": True}, "a corpus, and nothing else, needs an order"),
        ({"corpus": "wikitext2", "windows": True, "order": "arriving"}, "needs a block"),
        (
            {"corpus": "wikitext2", "windows": True, "order": "shuffled", "block": 4},
            "and nothing else, needs a block",
        ),
        (
            {"corpus": "wikitext2", "windows": True, "order": "arriving", "block": 0},
            "greater than 0",
        ),
        ({"corpus": "wikitext2", "windows": True, "order": "random"}, "'shuffled' or 'arriving'"),
    ],
)
def test_an_order_is_said_for_a_corpus_and_for_nothing_else(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build(Config, {"version": 1, "dataset": "wikitext2"} | values, "tasks.it")
    one_line(caught.value)


def begun_with(tokenizer: Path, data_dir: Path, shard_tokens: int) -> Path:
    """The folder of WikiText-2 as a preparation leaves it that was cut off at once."""
    folder = folder_of("wikitext2", data_dir)
    assert folder is not None
    (folder / writer.PREPARING).mkdir(parents=True)
    encoder, options = (
        load_encoder(tokenizer),
        PrepareOptions(validation=0.0, shard_tokens=shard_tokens),
    )
    note = Unfinished(
        format=1,
        tokenizer=encoder.digest,
        vocabulary=encoder.vocabulary,
        source=sources_of("wikitext2", None).description,
        options=plain(options),
    )
    write_record(folder / writer.PREPARING / underway.OPTIONS, plain(note))
    copy_tokenizer(tokenizer, folder)
    return folder


def test_a_corpus_that_the_cell_can_prepare_itself_is_not_missing(
    tokenizer: Path, tmp_path: Path
) -> None:
    spec, place = cell(), Place(open_store(tmp_path / "store"), tmp_path, tmp_path / "models")
    reason = unprepared_reason("wikitext2", tmp_path)
    message = str(availability.missing_data(spec, place))
    assert message.startswith(str(reason)) and message.endswith(
        "under --models-dir: the cell then prepares it itself"
    )
    assert "invoke data --prepare wikitext2" in message
    assert "--data-dir" in str(
        availability.missing_data(spec, dataclasses.replace(place, data_dir=None))
    )
    real = dataclasses.replace(spec, model=catalogue.model("gpt2_127m_equal"))
    copy_tokenizer_of("gpt2_127m", tokenizer, tmp_path)
    assert availability.missing_data(real, place) is None, "of the model that it is compared with"
    shuffled = cell(order="shuffled", block=None)
    assert (
        availability.missing_data(dataclasses.replace(shuffled, model=real.model), place) == reason
    )
    twice = dataclasses.replace(real, train_on=TrainSet(name="two", parts=real.train_on.parts * 2))
    assert availability.missing_data(twice, place) == reason, (
        "corpora that are mixed have to be finished"
    )
    begun_with(tokenizer, tmp_path, 900)
    assert availability.missing_data(spec, place) is None, "its own tokenizer lies there"
    with pytest.raises(Unavailable, match="is not prepared"):
        open_corpora(twice, dataclasses.replace(place, data_dir=tmp_path / "elsewhere"))


def copy_tokenizer_of(model: str, tokenizer: Path, folder: Path) -> None:
    (folder / "models").mkdir()
    (folder / "models" / model).symlink_to(tokenizer)


@pytest.mark.slow
def test_a_cell_ends_its_feeder_and_is_told_why_one_has_ended(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(open_store(tmp_path / "store"), tmp_path)
    folder = begun_with(tokenizer, tmp_path, 900)
    with feeding.preparing_corpus(cell(), place) as keep_alive:
        for _ in range(600):
            assert keep_alive()
            if underway.is_locked(folder):
                break
            time.sleep(0.05)
        child = feeder_pid()
        os.kill(child, signal.SIGKILL)
        with pytest.raises(
            EnvironmentFault, match=r"its process ended with SIGKILL .* run the same command again"
        ) as caught:
            while keep_alive():
                time.sleep(0.02)
        one_line(caught.value)
    first, second = (feeding.Feeder("wikitext2", cell(), place) for _ in range(2))
    assert first.keep_alive()
    while not underway.is_locked(folder):
        assert first.keep_alive()
        time.sleep(0.02)
    assert not second.keep_alive() and second.process is None, "somebody is at work already"
    child = feeder_pid()
    first.end()
    assert not Path(f"/proc/{child}").exists() and not underway.is_locked(folder)
    assert second.keep_alive() and second.process is not None, (
        "a cell that goes on takes over from one that has ended"
    )
    second.end()
    first, second = (feeding.Feeder("wikitext2", cell(), place) for _ in range(2))
    assert first.keep_alive() and second.keep_alive() and second.process is not None, (
        "both begin at once: one is there first"
    )
    loser, winner = (first, second) if second_is_there(first, second) else (second, first)
    winner.end()
    assert loser.keep_alive() and loser.process is not None and loser.process.poll() is None, (
        "the other one takes over"
    )
    loser.end()
    (folder / writer.PREPARING / underway.OPTIONS).write_text("{")
    with (
        feeding.preparing_corpus(cell(), place) as keep_alive,
        pytest.raises(EnvironmentFault, match="is damaged: delete"),
    ):
        while keep_alive():
            time.sleep(0.02)


def second_is_there(first: feeding.Feeder, second: feeding.Feeder) -> bool:
    """Whether the first one's process has ended, once one of the two has."""
    assert first.process is not None and second.process is not None
    while first.process.poll() is None and second.process.poll() is None:
        time.sleep(0.02)
    return first.process.poll() is not None


FEEDING = """
import sys, time
from pathlib import Path
from test_growing import cell, feeder_pid
from finrepro.running import feeding
from finrepro.evidence.place import Place
from finrepro.evidence.store import open_store
folder = Path(sys.argv[1])
with feeding.preparing_corpus(cell(), Place(open_store(folder / "store"), folder)):
    print(feeder_pid(), flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_a_feeder_does_not_outlive_a_cell_that_is_killed(tokenizer: Path, tmp_path: Path) -> None:
    folder = begun_with(tokenizer, tmp_path, 100)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    killed = subprocess.Popen(
        [sys.executable, "-c", FEEDING, str(tmp_path)],
        env=environment(PYTHONPATH=path),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout is not None
    child = int(killed.stdout.readline())
    for _ in range(1000):
        if underway.is_locked(folder):
            break
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    for _ in range(500):
        if not Path(f"/proc/{child}").exists() and not underway.is_locked(folder):
            return
        time.sleep(0.02)
    raise AssertionError("the feeder goes on without its cell")


def feeder_pid() -> int:
    """The process that feeds a cell of this one."""
    for _ in range(600):
        for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            if b"finrepro.data.arriving.feeder" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        time.sleep(0.02)
    raise AssertionError("no feeder")


def test_asked_to_stop_a_cell_does_not_wait_on_and_says_once_what_it_waits_for() -> None:
    messages: list[dict[str, Any]] = []
    waiting = while_waiting(messages.append, lambda: False, lambda: True)
    assert (
        waiting("waiting for shard 1")
        and waiting("waiting for shard 1")
        and waiting("waiting for shard 2")
    )
    assert messages == [{"event": "phase", "phase": f"waiting for shard {k}"} for k in (1, 2)]
    with pytest.raises(Interrupted, match="goes on from its last checkpoint"):
        while_waiting(messages.append, lambda: True, lambda: True)("waiting for shard 3")


@pytest.mark.slow
def test_a_cell_is_trained_on_a_corpus_that_it_prepares_meanwhile(tmp_path: Path) -> None:
    """Bit-equal: on the finished corpus, on one that is fed, and when training itself is cut off
    and goes on. Shards of any size.
    """
    texts = [
        text.text
        for source in sources_of("wikitext2", None).train
        for _, text in source.read(lambda *_: None)
    ]
    train_tokenizer([text[:20000] for text in texts], "gpt2", 1024).save_pretrained(
        tmp_path / "tokenizer"
    )
    spec, files, facts = dataclasses.replace(cell(), tasks=()), {}, {}
    for name, shard_tokens in (("whole", 100_000), ("fed", 2000), ("cut", 2500)):
        folder = begun_with(tmp_path / "tokenizer", tmp_path / name, shard_tokens)
        place = Place(open_store(tmp_path / f"{name}_store"), tmp_path / name)
        events: list[dict[str, Any]] = []
        if name == "whole":
            with feeding.preparing_corpus(spec, place) as keep_alive:
                while keep_alive():
                    time.sleep(0.05)
            assert underway.is_finished(folder)
        if name == "cut":
            with pytest.raises(Interrupted):
                run_cell(
                    spec,
                    place,
                    events.append,
                    lambda messages=events: any(event["event"] == "step" for event in messages),
                )
            assert not underway.is_locked(folder), "its feeder has ended with it"
        result = run_cell(spec, place, events.append, lambda: False)
        assert result["status"] == "done", result["reason"]
        assert "step" in {event["event"] for event in events}
        weights = place.store.run_folder(spec.run_id) / "weights"
        files[name] = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in weights.glob("*.safetensors")
        }
        facts[name] = result["data"]["corpora"]["wikitext2_text"]
        for number, digest in enumerate(facts[name].get("shards", [])):
            assert (
                hashlib.sha256((folder / f"train-{number:05d}.tokens").read_bytes()).hexdigest()
                == digest
            )
    assert files["whole"] == files["fed"] == files["cut"] != {}
    assert facts["whole"]["index"] and "waited_seconds" not in facts["whole"]
    assert facts["fed"]["finished"] or len(facts["fed"]["shards"]) >= 4, (
        "6 steps of 8 windows of 128 tokens"
    )
