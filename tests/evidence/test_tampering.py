"""Law: whatever is changed in a store or a prepared corpus is noticed by the command that reads it
next, or changes nothing that is read.
"""

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from fixtures import results
from fixtures.corpora import random_documents, write_corpus
from fixtures.model import CPU, make, process, spec_of  # noqa: F401

from finrepro.catalogue.cells import expand
from finrepro.catalogue.resolve import Cell
from finrepro.catalogue.selection import Selection
from finrepro.data.corpora.stream import open_corpus
from finrepro.data.preparing.verify import corpus_faults
from finrepro.data.preparing.writer import PREPARING
from finrepro.errors import FinreproError
from finrepro.evidence import store
from finrepro.evidence.files import write_json, write_lines
from finrepro.evidence.result import header
from finrepro.evidence.sealed import sealed
from finrepro.evidence.store import Store, open_store
from finrepro.exporting.recorded import find_run
from finrepro.tracking.check import check_store
from finrepro.training.checkpoint import Control, resume, save_checkpoint
from finrepro.training.engines.base import Engine
from finrepro.training.engines.start import start_engine
from finrepro.training.progress import Trained

LABEL = "gpt2_127m_mini-none-lora_r8-tfns-s0"
ROUNDS = 500
Read = Callable[[Path], object]


def seal(place: Store, cell: Cell) -> None:
    base = cell.base
    assert base is not None
    generator = random.Random(0)
    for spec, facts in ((base, {}), (cell.spec, {"run_id": base.run_id})):
        if facts:
            facts |= {"weights": place.weights_digest(base.run_id)}
        with place.new_run(spec.run_id) as folder:
            (folder / "weights").mkdir()
            for name in ("model.safetensors", "config.json"):
                (folder / "weights" / name).write_bytes(generator.randbytes(400))
            write_lines(folder / "loss.jsonl", [{"step": n, "loss": 1 / n} for n in range(1, 9)])
            write_lines(folder / "predictions.jsonl", [{"index": n} for n in range(20)])
            made = {
                "scores": [results.score("tfns", "accuracy", 0.7)],
                "costs": results.costs(),
                "data": results.data(base=facts),
            }
            write_json(folder / "result.json", header(spec, store.DONE, None, 0.0) | made)


@cache
def engine() -> Engine:
    spec = spec_of("gpt2_127m_mini", "lora_r8", engine="ddp")
    return start_engine(make(spec).model, spec.train, CPU, lambda _: 1.0, None)


def control(root: Path) -> Control:
    folder = open_store(root / "store").checkpoints("0123456789ab")
    return Control(lambda _: None, lambda: False, folder)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A store with two runs, a checkpoint, a campaign's record and scorings; a prepared corpus."""
    root = tmp_path / "whole"
    place = open_store(root / "store")
    (cell,) = expand(Selection("3", only=LABEL), "smoke")
    seal(place, cell)
    save_checkpoint(engine(), control(root), Trained(losses=[{"loss": 1.0}] * 3))
    record = {"id": "one", "table": "table3", "started": 1.5, "cells": [], "status": "finished"}
    write_json(place.results / "campaigns" / "one.json", sealed(record))
    for task in ("tfns", "fpb"):
        place.scorings.note(cell.spec, task)
    splits = {"train": random_documents(1, 40), "validation": random_documents(2, 5)}
    write_corpus(root / "corpus", splits)
    shutil.rmtree(root / "corpus" / PREPARING)
    return root


def read_run(root: Path, run_id: str) -> object:
    """What a table and an export read."""
    place = open_store(root / "store")
    found = place.found(run_id, weights=True)
    if found.state == store.DAMAGED:
        raise FinreproError(", ".join(found.faults))
    run = find_run(place, run_id, None)
    return [path.read_bytes() for path in sorted(run.folder.rglob("*")) if path.is_file()]


def read_checkpoint(root: Path) -> object:
    """What a resumed run starts from."""
    trained = Trained()
    resume(engine(), control(root), trained)
    if trained.remarks:
        raise FinreproError(trained.remarks[0])
    return trained.losses


def read_corpus(root: Path) -> object:
    index, faults = corpus_faults(root / "corpus")
    if faults:
        raise FinreproError(faults[0])
    stream = open_corpus(root / "corpus").stream()
    return index, stream.tokens(0, len(stream)).tolist()


def read_campaigns(root: Path) -> object:
    return open_store(root / "store").campaigns()


def read_scorings(root: Path) -> object:
    place = open_store(root / "store")
    if check_store(place).damaged_scorings:
        raise FinreproError("scorings")
    (cell,) = expand(Selection("3", only=LABEL), "smoke")
    return place.scorings.times(cell.spec)


def readers(root: Path) -> dict[Path, Read]:
    """Every file, and who reads it next."""
    found: dict[Path, Read] = {}
    for path in sorted((root / "store" / "results" / "runs").rglob("*")):
        run_id = path.relative_to(root / "store" / "results" / "runs").parts[0]
        found[path] = lambda root, run_id=run_id: read_run(root, run_id)
    found |= dict.fromkeys((root / "store" / "results" / "checkpoints").rglob("*"), read_checkpoint)
    found |= dict.fromkeys((root / "corpus").rglob("*"), read_corpus)
    found[root / "store" / "results" / "campaigns" / "one.json"] = read_campaigns
    found[root / "store" / "results" / "scorings.jsonl"] = read_scorings
    found[root / "store" / "results" / "store.json"] = lambda root: open_store(root / "store").root
    return {path.relative_to(root): read for path, read in found.items() if path.is_file()}


def flip(path: Path, _: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, _: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def delete(path: Path, *_: object) -> None:
    path.unlink()


def copy(path: Path, other: Path, _: object) -> None:
    shutil.copyfile(other, path)


def swap(path: Path, other: Path, _: object) -> None:
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


# What can be gone without a trace: a list that is not there is empty, and so is what it says.
MAY_BE_GONE = ("scorings.jsonl", "one.json", "store.json", "latest")


@pytest.mark.slow
def test_every_change_is_noticed_or_changes_nothing_that_is_read(
    whole: Path, tmp_path: Path
) -> None:
    generator = random.Random(20261130)
    files = readers(whole)
    before = {path: read(whole) for path, read in files.items()}
    assert len({path.suffix for path in files}) > 5 and len(files) > 20
    unnoticed, noticed = [], 0
    for number in range(ROUNDS):
        root = tmp_path / "copy"
        shutil.copytree(whole, root)
        path, other = generator.sample(sorted(files), 2)
        operations = [flip, flip, flip, truncate, copy, swap]
        operations += [] if path.name in MAY_BE_GONE else [delete]
        operation = generator.choice(operations)
        operation(root / path, root / other, generator)
        try:
            answer = files[path](root)
        except FinreproError as error:
            noticed += "\n" not in str(error)
        else:
            if answer != before[path]:
                unnoticed.append((number, operation.__name__, str(path), str(other)))
        shutil.rmtree(root)
    assert not unnoticed
    assert noticed > 0.95 * ROUNDS, "hardly any of them was read as before"
    print(json.dumps({"rounds": ROUNDS, "noticed": noticed}))
