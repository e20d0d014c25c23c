"""Law: one NaN or infinity anywhere is found, and nothing else is."""

import math

import pytest
import torch
from torch import nn

from finrepro.runtime.finite import is_finite, not_finite

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_none_is_found_wherever_it_stands(number: float, dtype: torch.dtype):
    clean = torch.randn(7, 33).to(dtype)
    clean[0, 0], clean[6, 32] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert is_finite(clean) and is_finite(clean.T)
    for place in (0, 100, 7 * 33 - 1):
        planted = clean.clone()
        planted.view(-1)[place] = number
        assert not is_finite(planted) and not is_finite(planted.T)
    assert is_finite(torch.full((), 1.0, dtype=dtype))
    assert not is_finite(torch.full((), number, dtype=dtype))


def test_what_holds_no_fraction_is_finite():
    assert is_finite(torch.empty(0, 3)) and is_finite(torch.tensor([255], dtype=torch.uint8))


def test_the_parameter_or_buffer_is_named():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert not_finite(model) is None
    model[1].running_mean[1] = math.inf
    assert not_finite(model) == "1.running_mean"
    with torch.no_grad():
        model[0].bias[2] = math.nan
    assert not_finite(model) == "0.bias"
