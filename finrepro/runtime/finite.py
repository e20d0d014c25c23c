"""Whether numbers are numbers: NaN or an infinity in weights is found before it is scored."""

import torch
from torch import Tensor, nn


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; integers are finite.

    The smallest and the largest element say it, since both are NaN where any is: one pass, at the
    speed of a sum, and without the copy of the tensor that `isfinite` would make.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return all(bool(bound.isfinite()) for bound in torch.aminmax(tensor.detach()))


def not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that holds NaN or an infinity; None if none does.

    Of a parameter that ZeRO-3 has sharded only this rank's part is read.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return next(
        (name for name, tensor in tensors if not is_finite(getattr(tensor, "ds_tensor", tensor))),
        None,
    )
