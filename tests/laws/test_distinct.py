"""The methods are different things: on one model, seed and data, no two of them learn alike or
leave the same file.
"""

import itertools
from pathlib import Path

import pytest
from fixtures.model import (
    ADAPTERS,
    CPU,
    QUANTIZERS,
    broken,
    images,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
)

from finrepro.catalogue.compatibility import refusal
from finrepro.catalogue.spec import RunSpec
from finrepro.kinds import adapter_of
from finrepro.training.checkpoint import Control
from finrepro.training.loop import train

DATA = random_examples(3, count=64, longest=20, answers=(1, 3))
STEPS, TWIN = (
    20,
    {"max_steps": 20, "warmup_steps": 2, "global_batch_size": 4, "max_tokens": 96, "engine": "ddp"},
)


def traces(
    specs: list[RunSpec], folder: Path
) -> list[tuple[str, tuple[float, ...], dict[str, str]]]:
    """(label, loss of every step, digest of every tensor that the export holds) of each cell."""
    from safetensors.torch import load_file

    found = []
    for spec in specs:
        model = make(spec).model
        trained = train(
            model, DATA, spec, CPU, Control(lambda _: None, lambda: False, folder / "checkpoints")
        )
        target = folder / spec.label
        target.mkdir()
        adapter_of(spec.adapter).export(model, target)
        files = [load_file(path) for path in sorted(target.glob("*.safetensors"))]
        assert files and len(trained.losses) == STEPS
        tensors = images((name, each) for file in files for name, each in file.items())
        found.append((spec.label, tuple(row["loss"] for row in trained.losses), tensors))
    return found


def assert_pairwise_different(found: list[tuple[str, tuple[float, ...], dict[str, str]]]) -> None:
    for (one, losses, tensors), (other, others, others_tensors) in itertools.combinations(found, 2):
        assert losses != others, f"{one} learns like {other}"
        assert tensors != others_tensors, f"{one} leaves the file of {other}"


def legal(pairs: list[tuple[str, str]]) -> list[RunSpec]:
    specs = [
        spec_of("gpt2_127m_mini", adapter, quantizer, **TWIN)
        for adapter, quantizer in pairs
        if adapter != "base"
    ]
    return [spec for spec in specs if refusal(spec) is None]


@pytest.mark.parametrize("quantizer", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_no_two_adapters_learn_alike(tmp_path: Path, quantizer: str) -> None:
    specs = legal([(adapter, quantizer) for adapter in ADAPTERS])
    found = traces(specs, tmp_path)
    assert len(found) >= 10
    assert_pairwise_different(found)
    (tmp_path / "again").mkdir()
    again = traces(specs[:1], tmp_path / "again")
    broken(assert_pairwise_different, [found[0], *again])  # the same method twice is the same thing


def test_no_two_quantizers_are_learned_on_alike(tmp_path: Path) -> None:
    specs = legal([("lora_r8", quantizer) for quantizer in QUANTIZERS])
    assert len(specs) == len(QUANTIZERS)
    assert_pairwise_different(traces(specs, tmp_path))
