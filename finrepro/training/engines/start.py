"""What the training loop drives: a model, its optimizer and its ranks, under DeepSpeed or under
torch's plain DDP.

Both average gradients over the ranks, so the loop scales each rank's share of the loss to make the
average the sum over the global batch.
"""

from collections.abc import Callable

import torch
from torch import nn

from finrepro.catalogue.spec import Train
from finrepro.kinds import optimizer_of
from finrepro.methods.layers.supervised import ExtraLoss, SupervisedLM
from finrepro.runtime import ranks
from finrepro.training import rates
from finrepro.training.engines.base import Engine
from finrepro.training.engines.ddp import PlainDDP
from finrepro.training.engines.deepspeed import DeepSpeed


def start_engine(
    model: nn.Module,
    settings: Train,
    device: torch.device,
    lr_scale: Callable[[str], float] = lambda _: 1.0,
    extra_loss: ExtraLoss | None = None,
) -> Engine:
    """The model under the engine asked for, with the optimizer of the settings, in the cell's
    process group.

    `lr_scale` is the factor to the learning rate of a parameter of this name; `extra_loss` is added
    to the objective once a step.
    """
    ranks.start_process_group(device)
    named = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    optimizer = optimizer_of(settings.optimizer).build(named, settings.lr)
    rates.split_groups(optimizer, named, lr_scale)
    kind = PlainDDP if settings.engine == "ddp" else DeepSpeed
    return kind(SupervisedLM(model, extra_loss), named, optimizer, settings, device)
