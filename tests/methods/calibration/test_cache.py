"""What is kept of a search: a model is searched once, and a layer of the cache is, to the last bit,
that of a search."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import (
    broken,
    process,  # noqa: F401
    spec_of,
)
from torch import Tensor

from finrepro.catalogue import reader
from finrepro.methods.calibration.cache import stored_in
from finrepro.methods.quantizers import icq
from finrepro.models.build import build

CONFIG = reader.quantizer("icq", "float32").config


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Blocks of each search."""
    counts: list[int] = []
    search = icq.search

    def counted(blocks: Tensor, config: icq.Config) -> Tensor:
        counts.append(len(blocks))
        return search(blocks, config)

    monkeypatch.setattr(icq, "search", counted)
    return counts


def drawn(seed: int = 0, rows: int = 24) -> Tensor:
    values = np.random.default_rng(seed).standard_normal((rows, 128)) + 0.2
    return torch.from_numpy(values.astype(np.float32))


def stored_equal(first: icq.Stored, second: icq.Stored) -> None:
    for name in ("codes", "scales", "levels"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert torch.equal(first.moved.codes, second.moved.codes)
    assert torch.equal(icq.decode(first), icq.decode(second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_searched_once_and_its_layer_is_that_of_a_search(
    dtype: torch.dtype, tmp_path: Path, searches: list[int]
) -> None:
    weight = drawn().to(dtype)
    expected = icq.encode(weight, CONFIG)
    assert len(searches) == 1
    with stored_in(tmp_path / "cache"):
        stored_equal(icq.encode(weight, CONFIG), expected)
        stored_equal(icq.encode(weight.clone(), CONFIG), expected)
        stored_equal(icq.encode(weight.T.contiguous().T, CONFIG), expected)
    assert len(searches) == 2
    broken(stored_equal, icq.encode(weight * 0.9 + 0.05, CONFIG), expected)
    (entry,) = (tmp_path / "cache").iterdir()
    blocks = weight.numel() // 64
    assert entry.stat().st_size < blocks * (1 + 2 / 256) + 1500  # as docs/methods.md says


@pytest.mark.parametrize(
    "changed",
    [
        lambda weight: (weight.index_fill(0, torch.tensor([3]), 0.125), CONFIG),
        lambda weight: (weight.bfloat16(), CONFIG),
        lambda weight: (weight.view(12, 256), CONFIG),
        lambda weight: (weight, dataclasses.replace(CONFIG, objective="mse")),
        lambda weight: (weight, dataclasses.replace(CONFIG, n=50)),
    ],
    ids=["a value", "dtype", "shape", "objective", "grid"],
)
def test_whatever_the_search_depends_on_is_another_entry(
    changed: Any, tmp_path: Path, searches: list[int]
) -> None:
    with stored_in(tmp_path):
        icq.encode(drawn(), CONFIG)
        icq.encode(*changed(drawn()))
    assert len(searches) == len(list(tmp_path.iterdir())) == 2


def test_another_version_of_the_algorithm_searches_again(
    tmp_path: Path, searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stored_in(tmp_path):
        icq.encode(drawn(), CONFIG)
        monkeypatch.setattr(icq, "VERSION", icq.VERSION + 1)
        icq.encode(drawn(), CONFIG)
    assert len(searches) == 2


@pytest.mark.parametrize("damage", ["a bit", "cut off", "empty"])
def test_a_damaged_entry_is_said_computed_again_and_replaced(
    damage: str, tmp_path: Path, searches: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with stored_in(tmp_path):
        expected = icq.encode(drawn(), CONFIG)
        (entry,) = tmp_path.iterdir()
        content = entry.read_bytes()
        flipped = bytes([*content[:-1], content[-1] ^ 1])
        entry.write_bytes({"a bit": flipped, "cut off": content[:-9], "empty": b""}[damage])
        stored_equal(icq.encode(drawn(), CONFIG), expected)
        assert capsys.readouterr().err == (
            f"finrepro: {entry} is damaged: searched again and replaced.\n"
        )
        assert entry.read_bytes() == content
        stored_equal(icq.encode(drawn(), CONFIG), expected)
    assert len(searches) == 2
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_one_line_and_no_error(
    tmp_path: Path, searches: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with stored_in(tmp_path / "file"):
        stored_equal(icq.encode(drawn(), CONFIG), icq.encode(drawn(), CONFIG))
    assert len(searches) == 2
    message = capsys.readouterr().err
    assert "cannot be" in message
    assert all(line.startswith("finrepro: ") for line in message.splitlines())


def test_a_second_cell_on_the_same_base_does_not_search(
    tmp_path: Path,
    searches: list[int],
    process: None,  # noqa: F811
) -> None:
    def cell(adapter: str, cache: Path | None) -> dict[str, Tensor]:
        spec = spec_of("llama3_1_8b_mini", quantizer="icq", adapter=adapter)
        model = build(spec, None, torch.device("cpu"), cache).model
        return {name: value for name, value in model.state_dict().items() if "icq_" in name}

    plain = cell("lora_r8", None)
    layers = len(searches)
    assert layers > 0
    assert cell("lora_r8", tmp_path).keys() == plain.keys()
    assert len(searches) == 2 * layers
    second = cell("iec_r8", tmp_path)
    assert len(searches) == 2 * layers
    assert len(list(tmp_path.iterdir())) == layers
    assert len(second) == 3 * layers
    for first, value in zip(plain.values(), second.values(), strict=True):
        assert torch.equal(first, value)
