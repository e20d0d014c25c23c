"""Law: the same sources and tokenizer give the same bytes, for any number of processes, after
kills and after a full disk; and what is not whole, not the recorded one or not for this model is
refused in one line."""

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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.corpora import edit_index, write_corpus
from fixtures.model import broken
from fixtures.process import one_line

from finrepro import PROJECT
from finrepro.data.corpora.index import Index, read_index
from finrepro.data.corpora.stream import open_corpus
from finrepro.data.corpora.windows import Windows
from finrepro.data.preparing import command, prepare, tokenizing, underway, writer
from finrepro.data.preparing.deduplicate import identity, is_held_out
from finrepro.data.preparing.documents import Document, Fault
from finrepro.data.preparing.prepare import PrepareOptions, Sources
from finrepro.data.preparing.sources import LocalFiles
from finrepro.data.preparing.tokenizing import Encoder, load_encoder
from finrepro.data.tokens import train_tokenizer
from finrepro.errors import EnvironmentFault, FinreproError

WORDS = [
    "the",
    "bank",
    "raised",
    "its",
    "guidance",
    "for",
    "margin",
    ",",
    "debt",
    "and",
    "cash",
    "flow",
    "after",
    "a",
    "strong",
    "quarter",
    "in",
    "Zürich",
]


def texts(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [
        " ".join(generator.choice(WORDS, size)) + f" {k}"
        for k, size in enumerate(generator.integers(3, 60, count))
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts(300), "gpt2", 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tokenizer: Path) -> Encoder:
    return load_encoder(tokenizer)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A file of 300 documents, one a line, eleven of which are there twice."""
    path = tmp_path / "in" / "lines.txt"
    path.parent.mkdir()
    path.write_text("".join(text + "\n" for text in [*texts(300), *texts(300)[:11]]))
    return path


OPTIONS = PrepareOptions(validation=0.1, shard_tokens=900)


def sources_of(path: Path) -> Sources:
    return Sources([LocalFiles(path, "lines")])


def images(folder: Path) -> dict[str, str]:
    """sha256 of every file, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def documents_of(folder: Path, split: str) -> list[list[int]]:
    stream = open_corpus(folder).stream(split)
    bounds = [*stream.starts(0, len(stream)).tolist(), len(stream)]
    return [stream.tokens(a, b).tolist() for a, b in zip(bounds, bounds[1:], strict=False)]  # noqa: RUF007


def test_every_document_is_there_once_with_its_start_token_in_the_order_of_the_sources(
    lines: Path, encoder: Encoder, tmp_path: Path
) -> None:
    index = prepare.prepare(sources_of(lines), encoder, tmp_path / "out", OPTIONS)
    work = tokenizing.tokenizer_of(encoder.definition)
    expected: dict[str, list[list[int]]] = {"train": [], "validation": []}
    for text in texts(300):
        ids = [encoder.start_id, *work.encode(text, add_special_tokens=False).ids]
        expected["validation" if is_held_out(identity(text), 0.1, 0) else "train"].append(ids)
    for name, documents in expected.items():
        assert documents_of(tmp_path / "out", name) == documents
        split = index.splits[name]
        assert (split.documents, split.tokens) == (len(documents), sum(map(len, documents)))
    assert sum(split.bytes for split in index.splits.values()) == sum(
        len(text.encode()) for text in texts(300)
    )
    assert index.counts == {"duplicates": 11, "empty": 0, "quarantined": 0, "reasons": {}}
    assert len(index.splits["train"].shards) > 5, "the law needs several shards"
    assert {shard.tokens for shard in index.splits["train"].shards[:-1]} == {900}
    assert not (tmp_path / "out" / writer.PREPARING).exists()
    windows = Windows(open_corpus(tmp_path / "out").stream(), 64)
    assert (
        sum(window.num_supervised for window in windows)
        == index.splits["train"].tokens - index.splits["train"].documents
    )


def test_special_tokens_in_a_text_are_text_and_a_text_without_tokens_is_a_document(
    encoder: Encoder,
) -> None:
    work = tokenizing.tokenizer_of(encoder.definition)
    (ids,) = tokenizing.encode_texts(work, encoder.start_id, ["<|endoftext|>"])
    assert ids[0] == encoder.start_id and encoder.start_id not in ids[1:]
    assert work.decode(ids[1:].tolist(), skip_special_tokens=False) == "<|endoftext|>"
    assert [ids.tolist() for ids in tokenizing.encode_texts(work, 7, [""])] == [[7, 7]]


def test_the_release_of_gpt2_with_its_two_files_is_read(data_dir: Path, tmp_path: Path) -> None:
    prepared = load_encoder(data_dir / "gpt2_tokenizer")
    assert (prepared.vocabulary, prepared.start_id) == (50257, 50256)
    assert tokenizing.encode_texts(tokenizing.tokenizer_of(prepared.definition), 50256, [" low"])[
        0
    ].tolist() == [50256, 1877]
    with pytest.raises(EnvironmentFault, match="holds no tokenizer"):
        load_encoder(tmp_path)


# The same bytes.


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    lines: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "BATCH_DOCUMENTS", 7)
    for workers in (1, 3):
        prepare.prepare(
            sources_of(lines), encoder, tmp_path / f"out{workers}", OPTIONS, workers=workers
        )
    assert images(tmp_path / "out1") == images(tmp_path / "out3")


class Cut(LocalFiles):
    """A source that fails after so many documents."""

    limit = 0

    def read(self, fault: Fault) -> Iterator[tuple[str, Document]]:
        for number, pair in enumerate(super().read(fault)):
            if number == self.limit:
                raise EnvironmentFault("cut off")
            yield pair


def cut_after(lines: Path, limit: int) -> Cut:
    source = Cut(lines, "lines")
    object.__setattr__(source, "limit", limit)
    return source


def resumes_to_the_same_bytes(
    lines: Path, encoder: Encoder, folder: Path, expected: dict[str, str]
) -> list[int]:
    """Cut off after more and more documents, then made to its end; how many texts each attempt
    has tokenized.
    """
    tokenized = [0]
    plain = tokenizing.encode_texts

    def counted(work: object, start: int, source: list[str]) -> tokenizing.Ids:
        tokenized[-1] += len(source)
        return plain(work, start, source)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "encode_texts", counted)
        patch.setattr(tokenizing, "BATCH_DOCUMENTS", 1)
        for limit in (0, 1, 37, 38, 120, 299):
            with pytest.raises(EnvironmentFault, match="cut off"):
                prepare.prepare(Sources([cut_after(lines, limit)]), encoder, folder, OPTIONS)
            assert not list(folder.glob(".*.partial")), "nothing half-written is left"
            tokenized.append(0)
        prepare.prepare(sources_of(lines), encoder, folder, OPTIONS)
    assert images(folder) == expected
    return tokenized


def test_a_preparation_that_was_cut_off_goes_on_and_ends_with_the_same_bytes(
    lines: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare.prepare(sources_of(lines), encoder, tmp_path / "whole", OPTIONS)
    expected = images(tmp_path / "whole")
    tokenized = resumes_to_the_same_bytes(lines, encoder, tmp_path / "out", expected)
    with pytest.raises(EnvironmentFault, match="cut off"):
        prepare.prepare(Sources([cut_after(lines, 299)]), encoder, tmp_path / "lost", OPTIONS)
    (tmp_path / "lost" / "train-00003.tokens").unlink()
    (tmp_path / "lost" / ".index.json.1.partial").write_text("of a process that was killed")
    (tmp_path / "lost" / ".tokenizer.1.partial").mkdir()
    prepare.prepare(sources_of(lines), encoder, tmp_path / "lost", OPTIONS)
    assert images(tmp_path / "lost") == expected, "a shard that was taken away is made again"
    assert not list((tmp_path / "lost").glob(".*.partial"))
    assert tokenized[-1] < 100, "what lies in whole shards is not tokenized again"
    plain = writer.SplitWriter.__init__

    def forgets_the_cut_document(self: writer.SplitWriter, *arguments: object) -> None:
        plain(self, *arguments)  # type: ignore[arg-type]
        self.documents_on_disk += 1

    monkeypatch.setattr(writer.SplitWriter, "__init__", forgets_the_cut_document)
    broken(resumes_to_the_same_bytes, lines, encoder, tmp_path / "out2", expected)


PROGRAM = """
import json, sys
from pathlib import Path
from finrepro.data.preparing.prepare import PrepareOptions, Sources, prepare
from finrepro.data.preparing import writer
from finrepro.data.preparing.sources import LocalFiles
from finrepro.data.preparing.tokenizing import Encoder
from finrepro.errors import FinreproError
if __name__ == "__main__":
    encoder, lines, out, slow, workers = sys.argv[1:]
    plain = writer.SplitWriter._close_shard
    def slowly(self):
        plain(self)
        print(self.shards[-1].name, flush=True)
        if slow == "slow":
            sys.stdin.readline()
    writer.SplitWriter._close_shard = slowly
    try:
        sources = Sources([LocalFiles(Path(lines), "lines")])
        prepare(sources, Encoder(**json.loads(encoder)), Path(out),
                PrepareOptions(validation=0.1, shard_tokens=900), workers=int(workers))
    except FinreproError as error:
        print("finrepro:", error)
        sys.exit(error.exit_code)
"""


def program(
    encoder: Encoder, *arguments: object, limit: int | None = None
) -> "subprocess.Popen[str]":
    def prepared() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(vars(encoder)), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=prepared,
    )


def test_killed_in_the_middle_it_goes_on_and_its_processes_do_not_stay(
    lines: Path, encoder: Encoder, tmp_path: Path
) -> None:
    prepare.prepare(sources_of(lines), encoder, tmp_path / "whole", OPTIONS)
    running = program(encoder, lines, tmp_path / "out", "slow", 2)
    assert running.stdout is not None and running.stdin is not None
    for _ in range(3):
        assert running.stdout.readline()
        running.stdin.write("\n")
        running.stdin.flush()
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    assert len(children) >= 2
    running.send_signal(signal.SIGKILL)
    running.communicate()
    complete = images(tmp_path / "out")
    with pytest.raises(EnvironmentFault, match=r"has no index\.json \(a preparation was begun"):
        open_corpus(tmp_path / "out")
    prepare.prepare(sources_of(lines), encoder, tmp_path / "out", OPTIONS)
    assert images(tmp_path / "out") == images(tmp_path / "whole")
    complete_files = {
        name for name in complete if name.endswith(".tokens") and not name.startswith(".")
    }
    assert len(complete_files) >= 3 and all(
        images(tmp_path / "out")[name] == complete[name] for name in complete_files
    )
    for _ in range(100):
        if not any(Path(f"/proc/{child}").exists() for child in children):
            return
        time.sleep(0.1)
    raise AssertionError("the tokenizing processes outlive the one that started them")


def test_a_full_disk_is_one_line_and_loses_nothing(
    lines: Path, encoder: Encoder, tmp_path: Path
) -> None:
    """A file of 1,500 bytes is all that there is room for: a shard has 1,800."""
    running = program(encoder, lines, tmp_path / "out", "fast", 1, limit=1500)
    out, _ = running.communicate(timeout=100)
    assert running.returncode == 3
    assert (
        "no space left for" in out
        and "make room and run the same command again" in out
        and out.count("\n") == 1
    )
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert names == [writer.PREPARING], (
        "a shard is whole or absent, and nothing half-written is left"
    )
    prepare.prepare(sources_of(lines), encoder, tmp_path / "out", OPTIONS)
    prepare.prepare(sources_of(lines), encoder, tmp_path / "whole", OPTIONS)
    assert images(tmp_path / "out") == images(tmp_path / "whole")


# What is refused.


def refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(FinreproError) as caught:
        call()
    assert message in one_line(caught.value)


def test_a_folder_is_gone_on_with_only_for_the_same_corpus(
    lines: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    complete = prepare.prepare(sources_of(lines), encoder, out, OPTIONS)
    before = images(out)
    assert (
        prepare.prepare(sources_of(lines), encoder, out, OPTIONS) == complete
        and images(out) == before
    )
    again = partial(prepare.prepare, sources_of(lines), encoder, out)
    refused(
        "a corpus of another options",
        lambda: again(PrepareOptions(validation=0.2, shard_tokens=900)),
    )
    other_encoder = dataclasses.replace(encoder, digest="1" * 64)
    refused(
        "a corpus of another tokenizer",
        lambda: prepare.prepare(sources_of(lines), other_encoder, out, OPTIONS),
    )
    lines.write_text("something else\n")
    refused("a corpus of another source", lambda: again(OPTIONS))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    refused(
        "is not empty",
        lambda: prepare.prepare(sources_of(lines), encoder, tmp_path / "full", OPTIONS),
    )
    refused("is not writable", lambda: prepare.prepare(sources_of(lines), encoder, lines, OPTIONS))
    assert images(out) == before


def test_sources_that_changed_in_between_are_found(
    lines: Path, encoder: Encoder, tmp_path: Path
) -> None:
    """Of the same name and size, so that only the texts tell."""
    for number in (1, 2):
        out = tmp_path / f"out{number}"
        with pytest.raises(EnvironmentFault, match="cut off"):
            prepare.prepare(Sources([cut_after(lines, 290)]), encoder, out, OPTIONS)
        content = lines.read_text()
        lines.write_text("y" + content[1:] if number == 1 else "\n" * len(content.encode()))
        refused(
            "are not what they were",
            lambda out=out: prepare.prepare(sources_of(lines), encoder, out, OPTIONS),
        )
        lines.write_text(content)


def test_two_processes_do_not_write_into_one_folder(
    lines: Path, encoder: Encoder, tmp_path: Path
) -> None:
    (tmp_path / "out" / writer.PREPARING).mkdir(parents=True)
    with underway.lock(tmp_path / "out"):
        refused(
            "another process",
            lambda: prepare.prepare(sources_of(lines), encoder, tmp_path / "out", OPTIONS),
        )


def test_sources_without_a_document_to_train_on_are_refused(
    encoder: Encoder, tmp_path: Path
) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    refused(
        "no document to train on",
        lambda: prepare.prepare(
            sources_of(tmp_path / "blank.txt"), encoder, tmp_path / "o", OPTIONS
        ),
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small one: five shards of 8 tokens."""
    return write_corpus(
        tmp_path / "corpus", {"train": [[0, *range(1, 9)]] * 4, "validation": []}, 8
    )


def test_a_corpus_that_has_recorded_the_digest_of_version_1_is_the_same_corpus(
    lines: Path, encoder: Encoder, tmp_path: Path
) -> None:
    older = dataclasses.replace(encoder, digest=encoder.digest_1)
    complete = prepare.prepare(sources_of(lines), older, tmp_path / "out", OPTIONS)
    before = images(tmp_path / "out")
    assert prepare.prepare(sources_of(lines), encoder, tmp_path / "out", OPTIONS) == complete
    assert images(tmp_path / "out") == before and complete.tokenizer == encoder.digest_1
    assert encoder.digest != encoder.digest_1


def test_what_is_not_a_corpus_for_this_model_is_refused_when_it_is_opened(
    corpus: Path, tmp_path: Path
) -> None:
    assert (
        open_corpus(corpus, "0" * 64, 512).digest
        == hashlib.sha256((corpus / "index.json").read_bytes()).hexdigest()
    )
    refused("made with another tokenizer", lambda: open_corpus(corpus, "1" * 64))
    refused("ids up to 511, the model has only 511", lambda: open_corpus(corpus, None, 511))
    refused("unknown split", lambda: open_corpus(corpus).stream("test"))
    refused("holds no document", lambda: open_corpus(corpus).stream("validation"))
    refused("holds no prepared corpus", lambda: open_corpus(tmp_path))
    index = corpus / "index.json"
    content = index.read_text()
    for change, message in (
        ({"format": 2}, "is of format 2"),
        ({"dtype": "int8"}, "damaged"),
        ({"more": 1}, "damaged"),
    ):
        edit_index(corpus, **change)
        refused(message, lambda: open_corpus(corpus))
        index.write_text(content)
    for text in (content[:-20], content.replace("512", "513"), content + "\n"):
        index.write_text(text)
        refused("damaged", lambda: open_corpus(corpus))
    (corpus / "index.json.sha256").unlink()
    index.write_text(content)
    assert open_corpus(corpus).index, "of a version that wrote no seal"


def damaged(
    corpus: Path, change: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> str:
    change(corpus)
    checked = command.verify_corpus(corpus)
    assert checked.damaged
    checked.show()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message", "opened"),
    [
        (
            lambda c: (c / "train-00002.tokens").unlink(),
            "train-00002.tokens: is missing",
            "prepare it again",
        ),
        (
            lambda c: (c / "train-00001.starts").unlink(),
            "train-00001.starts: is missing",
            "prepare it again",
        ),
        (
            lambda c: os.truncate(c / "train-00000.tokens", 14),
            "train-00000.tokens: has sha256",
            "has 14 bytes, expected 16",
        ),
        (
            lambda c: (c / "train-00003.tokens").write_bytes(b"x" * 16),
            "train-00003.tokens: has sha256",
            None,
        ),
    ],
)
def test_a_wrong_shard_is_named(
    change: Callable[[Path], object],
    message: str,
    opened: str | None,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command.verify_corpus(corpus).show()
    assert "0 damaged" in capsys.readouterr().out
    assert f"damaged: {message}" in damaged(corpus, change, capsys)
    if opened:
        refused(opened, lambda: open_corpus(corpus).stream())


def resealed(corpus: Path, name: str, content: bytes) -> None:
    """Another content with the sha256 that goes with it: only the counts can tell."""
    kind = name.rpartition(".")[2]
    (corpus / name).write_bytes(content)
    index = json.loads((corpus / "index.json").read_text())
    for shard in index["splits"]["train"]["shards"]:
        if name.startswith(shard["name"]):
            shard[f"sha256_{kind}"] = hashlib.sha256(content).hexdigest()
    edit_index(corpus, **index)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-00000.tokens",
            np.array([0, 1, 2, 3, 4, 5, 6, 600], "<u2"),
            "holds the id 600, the tokenizer has 512",
        ),
        ("train-00000.starts", np.array([1], "<u4"), "does not begin with the start token"),
        ("train-00000.starts", np.array([], "<u4"), "and 0 documents, the index says 8 and 1"),
    ],
)
def test_contents_that_the_index_cannot_mean_are_named(
    name: str, content: "np.ndarray", message: str, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in damaged(corpus, lambda c: resealed(c, name, content.tobytes()), capsys)


# Damaged text, duplicates, what is held out.


def test_damaged_documents_stop_or_are_set_aside_as_asked(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"text": "a b"}\n{"text": \n{"text": "\\ud800"}\n'
        b'{"text": " "}\n{"text": "c"}\n{"text": " a  b"}\n'
    )
    source = Sources([LocalFiles(path)])
    options = PrepareOptions(validation=0.0)
    make = partial(prepare.prepare, source, encoder, tmp_path / "out", options)
    refused("rows.jsonl, line 2: not JSON", make)
    refused("unknown choice for --on-error 'ignore'", lambda: make(on_error="ignore"))
    index = make(on_error="skip")
    assert (
        index.counts["quarantined"] == 2
        and index.counts["empty"] == 1
        and index.counts["duplicates"] == 1
    )
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert [(row["file"], row["line"]) for row in rows] == [("rows.jsonl", 2), ("rows.jsonl", 3)]
    assert index.splits["train"].documents == 2
    assert sum(index.counts["reasons"].values()) == 2


def test_two_texts_are_the_same_up_to_white_space_and_unicodes_two_spellings() -> None:
    assert identity(" a\tb\n") == identity("a b") == identity("a  b")
    assert identity("Zu\u0308rich") == identity("Zürich") != identity("Zurich")
    assert identity("A b") != identity("a b") != identity("ab")


def test_the_held_out_documents_are_a_fraction_that_neither_order_nor_company_changes() -> None:
    keys = [identity(text) for text in texts(4000)]
    few = {key for key in keys if is_held_out(key, 0.02, 0)}
    more = {key for key in keys if is_held_out(key, 0.1, 0)}
    assert few < more and 300 < len(more) < 500  # 400 expected, standard deviation 19
    assert more != {key for key in keys if is_held_out(key, 0.1, 1)}
    assert not any(is_held_out(key, 0.0, 0) for key in keys)


def test_a_validation_split_of_its_own_keeps_its_documents_from_the_training_split(
    encoder: Encoder, tmp_path: Path
) -> None:
    for name, content in (("train", "a b\nc d\ne f\n"), ("validation", "c d\ng h\n")):
        (tmp_path / f"{name}.txt").write_text(content)
    sources = Sources(
        [LocalFiles(tmp_path / "train.txt", "lines")],
        [LocalFiles(tmp_path / "validation.txt", "lines")],
    )
    refused("of their own", lambda: prepare.prepare(sources, encoder, tmp_path / "o", OPTIONS))
    index = prepare.prepare(sources, encoder, tmp_path / "out", PrepareOptions(validation=0.0))
    assert {name: split.documents for name, split in index.splits.items()} == {
        "train": 2,
        "validation": 2,
    }


# The command.


def prepared(tokenizer: Path, source: str, out: Path, **options: Any) -> Index:
    corpus = command.prepare_corpus(source, tokenizer, out, **({"workers": 1} | options))
    corpus.show()
    assert corpus.index == read_index(out)
    return corpus.index


def test_the_command_prepares_a_file_and_says_what_it_made(
    lines: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = prepared(tokenizer, str(lines), tmp_path / "out", documents="lines", validation=0.1)
    assert index.options["validation"] == 0.1
    out = capsys.readouterr().out
    assert (
        f"train: {index.splits['train'].documents} documents" in out
        and "left out: 11 duplicates" in out
    )
    for options, message in (
        ({"workers": 0}, "--workers '0'"),
        ({"validation": 1.0}, "--validation '1.0'"),
        ({"documents": "words"}, "unknown rule for documents 'words'"),
        ({"on_error": "ski"}, "Did you mean 'skip'"),
    ):
        refused(
            message,
            lambda options=options: prepared(tokenizer, str(lines), tmp_path / "o2", **options),
        )
    assert (
        command.worker_count(None, sources_of(lines)) == 1
        and command.worker_count(3, sources_of(lines)) == 3
    )
    refused(
        "goes with files of your own",
        lambda: prepared(tokenizer, "wikitext2", tmp_path / "o2", documents="lines"),
    )


@pytest.mark.slow
def test_the_embedded_corpus_is_prepared_by_its_name(tokenizer: Path, tmp_path: Path) -> None:
    index = prepared(tokenizer, "wikitext2", tmp_path / "out")
    assert {name: split.documents for name, split in index.splits.items()} == {
        "train": 5,
        "validation": 60,
    }
    assert index.splits["train"].bytes == 2887164
