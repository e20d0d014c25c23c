"""Gradients of every method against finite differences, in double precision: what is trained is
what the forward pass computes.
"""

import pytest
import torch
from fixtures.model import (
    ADAPTERS,
    MINIATURES,
    answer_log_likelihood,
    broken,
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
)
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.compatibility import refusal

# Step, and tolerance: Transformers' RMS norm computes in float32 whatever it is given, and is what
# limits Llama's.
PRECISION = dict(zip(MINIATURES, ((1e-6, 1e-6), (1e-3, 2e-3)), strict=True))
EXAMPLE = random_examples(0, count=1)[0]
DETACHED = (
    "dora_r8",
)  # no gradient through its norm, by definition: tests/methods/adapters/test_lora.py has its slopes
TRAINED = [
    name
    for name in ADAPTERS
    if name not in ("base", *DETACHED)
    and refusal(spec_of(MINIATURES[0], name)) is None
    and reader.adapter(name).kind != "base"
]


def slope_is_the_difference(
    model: nn.Module, slopes: list[Tensor], step: float, tolerance: float
) -> None:
    """Along a direction that is half the slope's own and half random the gradient's product is
    the central difference's.
    """
    generator = torch.Generator().manual_seed(0)
    trained = [each for each in model.parameters() if each.requires_grad]
    noise = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in trained]
    along = [
        slope / slope.norm() + each / each.norm() for slope, each in zip(slopes, noise, strict=True)
    ]
    values = []
    with torch.no_grad():
        for side in (1, -2, 1):
            for each, direction in zip(trained, along, strict=True):
                each.add_(direction, alpha=side * step)
            values.append(answer_log_likelihood(model, EXAMPLE))
    expected = (values[0] - values[1]) / (2 * step)
    found = torch.stack(
        [(slope * direction).sum() for slope, direction in zip(slopes, along, strict=True)]
    ).sum()
    size = torch.stack(
        [slope.norm() * direction.norm() for slope, direction in zip(slopes, along, strict=True)]
    ).sum()
    assert abs(found - expected) <= tolerance * size, f"slope {found}, difference {expected}"


@pytest.mark.parametrize("name", MINIATURES)
@pytest.mark.parametrize("adapter", TRAINED)
def test_the_gradient_of_every_method_is_that_of_finite_differences(
    name: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Tensor, "float", Tensor.double
    )  # of the logits: they are to keep their digits
    model = stir(make(spec_of(name, adapter)).model).double().eval()
    answer_log_likelihood(model, EXAMPLE).backward()
    slopes = [
        each.grad for each in model.parameters() if each.requires_grad and each.grad is not None
    ]
    assert len(slopes) == sum(each.requires_grad for each in model.parameters())
    slope_is_the_difference(model, slopes, *PRECISION[name])
    broken(slope_is_the_difference, model, [1.01 * each for each in slopes], *PRECISION[name])
