"""Why int8 is not compiled, by its threshold."""

import pytest
import torch

from finrepro.methods.quantizers import bnb_int8


@pytest.mark.parametrize(
    ("threshold", "reason"), [(6.0, "sizes depend on the values"), (0.0, "rounds activations")]
)
def test_compilation_is_refused_for_the_reason_of_the_threshold(
    threshold: float, reason: str
) -> None:
    message = bnb_int8.not_compiled(bnb_int8.Config(threshold=threshold))
    assert reason in message and "\n" not in message


def test_the_last_bit_of_an_activation_can_decide_its_code() -> None:
    """Two inputs, next but one in float32, whose results are a whole code apart: sums in another
    order, as inductor's, are enough for it.
    """
    config = bnb_int8.Config(threshold=0.0)
    layer = bnb_int8.linear(bnb_int8.encode(torch.eye(2), config), None)
    middle = torch.tensor(2.5 + 2**-10)  # between two codes, and two numbers of float16
    below, above = (
        layer(torch.stack([torch.tensor(127.0), torch.nextafter(middle, torch.tensor(end))])[None])
        for end in (0.0, 127.0)
    )
    assert below[0, 0] == above[0, 0]
    assert [round(float(output[0, 1])) for output in (below, above)] == [2, 3]
