"""From a dense model to a low-rank one and back: the skeleton, the weights as they arrive, and the
dense model that computes the same.

In a low-rank model every linear layer of the blocks is an `nn.Linear`, a factor or a layer that was
not targeted: GPT-2's `Conv1D`, which stores the transpose, is turned round once and back again on
the way out. Its own checkpoints hold the factors (`...attn.c_attn.a.weight`); any other checkpoint
is a dense one, and is decomposed as it is read, as are drawn weights.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from finrepro.methods.layers.linear import is_conv1d, linear_layers
from finrepro.methods.layers.low_rank import dense_weight, fill, like, low_rank_layers
from finrepro.models import loading, safetensors
from finrepro.sizes.low_rank import FUSED, LowRank, is_target

# in config.json: Transformers alone would build a dense model and leave its weights to chance
MARK = "finrepro_low_rank"


def restructured(model: Any, chosen: LowRank, rank: int) -> Any:
    """A dense `skeleton` with its targeted layers as factors of this rank, in place, without
    values.
    """
    for name, layer in linear_layers(model).items():
        targeted = is_target(name, chosen.targets)
        split = chosen.split_qkv and is_target(name, (FUSED,))
        model.set_submodule(name, like(layer, rank if targeted else None, split))
    setattr(
        model.config,
        MARK,
        {"rank": rank, "layers": len(low_rank_layers(model)), "split_qkv": chosen.split_qkv},
    )
    return model


def holds_factors(model: Any, folder: Path) -> bool:
    """Whether the checkpoint in `folder` has a tensor of the name of one of the low-rank `model`'s
    first factors.

    Raises `EnvironmentFault` as `shards.tensors` does.
    """
    prefix = f"{model.base_model_prefix}."
    names = {f"{name}.a.weight" for name in low_rank_layers(model)}
    return (
        not safetensors.tensors(folder)
        .keys()
        .isdisjoint(names | {name.removeprefix(prefix) for name in names})
    )


class Factored:
    """A source for a low-rank model (see `loading.Source`): the dense weights of another source,
    decomposed part by part.

    `dense` is the dense skeleton of the same model, which `inner` fills. One part of it is there at
    a time, beside its factors. The decomposition is computed where the part will live; a seed means
    the same drawn weights everywhere, and their factors up to rounding.
    """

    def __init__(self, dense: Any, inner: loading.Source, chosen: LowRank, seed: int) -> None:
        self._dense, self._inner = dense, inner
        self._options = {"svd_niter": chosen.svd_niter, "rescale": chosen.rescale, "seed": seed}

    @torch.no_grad()
    def fill(self, prefix: str, part: nn.Module, device: torch.device) -> None:
        """As in `Source`."""
        if not any(parameter.is_meta for parameter in part.parameters()):
            return
        dense = self._dense.get_submodule(prefix)
        self._inner.fill(prefix, dense, device)
        dense.to(device)
        done: set[str] = set()
        for name, layer in dense.named_modules():
            if not (isinstance(layer, nn.Linear) or is_conv1d(layer)) or not name:
                continue
            weight = layer.weight.detach()
            bias = None if layer.bias is None else layer.bias.detach()
            fill(
                part.get_submodule(name),
                weight.T if is_conv1d(layer) else weight,
                bias,
                **self._options,
            )
            done |= {f"{name}.{key}" for key, _ in layer.named_parameters()}
        for name, parameter in list(dense.named_parameters()):
            if name not in done:
                loading.place(part, name, nn.Parameter(parameter.detach()))
        dense.to("meta")


@torch.no_grad()
def to_dense(model: Any, dense: Any) -> Any:
    """The low-rank `model` with W = B A in place of its factors, a layer at a time and in place: a
    standard model of its family.

    `dense` is the dense skeleton of the same model, which gives each layer its class.
    """
    for name, plain in linear_layers(dense).items():
        weight, bias = dense_weight(model.get_submodule(name))
        kept = {"weight": weight.T.contiguous() if is_conv1d(plain) else weight, "bias": bias}
        for key, value in kept.items():
            setattr(
                plain,
                key,
                value
                if value is None
                else nn.Parameter(value.detach().clone(), requires_grad=False),
            )
        model.set_submodule(name, plain)
    vars(model.config).pop(MARK, None)
    return model
