"""Law: a GPU's number has its source or is absent, and the roofline is the arithmetic of two
rates.
"""

import re
from typing import Any

import pytest
import torch
from fixtures.model import broken
from fixtures.process import one_line

from finrepro.budgeting import roofline
from finrepro.budgeting.hardware import NUMBERS, Gpu, gpu
from finrepro.catalogue.reader import entries
from finrepro.errors import UsageError
from finrepro.runtime import matmul
from finrepro.settings import build

GPUS = tuple(entries("hardware"))


@pytest.mark.parametrize("name", GPUS)
def test_every_number_has_a_source_and_nothing_else_has(name: str):
    card = gpu(name)
    assert set(card.sources) == {field for field in NUMBERS if getattr(card, field) is not None}
    assert all(
        re.search(r"@[0-9a-f]{7}|karpathy/|\(May 2026\)", text) for text in card.sources.values()
    )
    if card.matmul_bf16:
        assert 0.7 < card.matmul_bf16 / card.require("peak_bf16") < 0.9


@pytest.mark.parametrize(
    "changed", [{"price": None}, {"sources": {}}, {"price": 3.0, "sources": {"peak_bf16": "read"}}]
)
def test_a_number_without_its_source_is_refused(changed: dict[str, Any]):
    values = {"name": "h100", **entries("hardware")["h100"]}
    build(Gpu, values, "hardware.h100")
    with pytest.raises(UsageError) as raised:
        build(Gpu, values | changed, "hardware.h100")
    assert "sources must be given for exactly" in one_line(raised.value)


def test_an_unknown_gpu_or_number_is_one_line():
    with pytest.raises(UsageError) as raised:
        gpu("h20")
    assert "unknown GPU 'h20'. Did you mean 'h200'?" in one_line(raised.value)
    with pytest.raises(UsageError) as raised:
        gpu("a5000").require("peak_bf16")
    assert "hardware.a5000.peak_bf16: no source was read" in one_line(raised.value)


# Computed by hand from the roofline model: layer, rank -> by operations; H100 and H200, two
# products and fused; 8192 tokens.
CEILINGS = [
    ((768, 768, 64), 6.0, (1.48, 1.61), (2.13, 2.30)),
    ((768, 3072, 64), 9.6, (2.49, 2.57), (3.57, 3.68)),
    ((1600, 1600, 64), 12.5, (3.22, 3.35), (4.61, 4.80)),
    ((1600, 1600, 256), 3.1, (2.83, 3.12), (3.12, 3.12)),
    ((1600, 6400, 64), 20.0, (5.27, 5.36), (7.55, 7.67)),
    ((4096, 14336, 256), 12.4, (12.4, 12.4), (12.4, 12.4)),
]


def ceiling_is(ceiling: roofline.Ceiling, flops: float, two: float, fused: float) -> None:
    assert (ceiling.flops, ceiling.two_products, ceiling.fused) == pytest.approx(
        (flops, two, fused), rel=0.01
    )


@pytest.mark.parametrize(("size", "flops", "h100", "h200"), CEILINGS)
def test_the_ceiling_of_a_low_rank_layer_is_that_of_the_roofline(
    size: tuple[int, int, int], flops: float, h100: tuple[float, float], h200: tuple[float, float]
):
    for name, speedups in (("h100", h100), ("h200", h200)):
        ceiling_is(roofline.low_rank(gpu(name), *size, 8192), flops, *speedups)
    if size[2] == 64:
        broken(ceiling_is, roofline.low_rank(gpu("h200"), *size, 8192), flops, *h100)


def test_the_ridge_is_rate_over_bandwidth():
    assert [round(roofline.ridge(gpu(name))) for name in ("a100", "h200", "h100")] == [
        136,
        166,
        237,
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_the_rate_of_the_device_is_measured_on_one_of_its_shapes(dtype: torch.dtype):
    rate = matmul.measure(torch.device("cpu"), dtype, 0.02)
    assert rate.flops > 1e6 and rate.shape in matmul.CPU_SHAPES  # what it is depends on the machine
    assert rate.dtype == str(dtype).removeprefix("torch.") and rate.device.startswith("CPU, ")
