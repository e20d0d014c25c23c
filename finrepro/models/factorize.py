"""From a dense model to a low-rank one and back: the skeleton, the weights while they are loaded,
and the dense model that computes the same.

In a low-rank model every linear layer of the blocks is an `nn.Linear`, a factor or a layer that was
not targeted: GPT-2's `Conv1D`, which stores the transpose, is transposed when it is loaded and
again in `to_dense`. Its own checkpoints hold the factors (`...attn.c_attn.a.weight`); any other
checkpoint is a dense one, and is decomposed as it is read, as are drawn weights.
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


def restructured(model: Any, low_rank: LowRank, rank: int) -> Any:
    """A dense `skeleton` with its targeted layers as factors of this rank, in place, without
    values.
    """
    for name, layer in linear_layers(model).items():
        targeted = is_target(name, low_rank.targets)
        split = low_rank.split_qkv and is_target(name, (FUSED,))
        model.set_submodule(name, like(layer, rank if targeted else None, split))
    setattr(
        model.config,
        MARK,
        {"rank": rank, "layers": len(low_rank_layers(model)), "split_qkv": low_rank.split_qkv},
    )
    return model


def holds_factors(model: Any, folder: Path) -> bool:
    """Whether the checkpoint in `folder` has a tensor of the name of one of the low-rank `model`'s
    first factors.

    Raises `EnvironmentFault` as `safetensors.tensors` does.
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
    decomposed module by module.

    `dense` is the dense skeleton of the same model, which `inner` fills, one module at a time. The
    decomposition is computed on the module's device; a seed gives the same drawn weights on every
    device, and the same factors up to rounding.
    """

    def __init__(self, dense: Any, inner: loading.Source, low_rank: LowRank, seed: int) -> None:
        self._dense, self._inner = dense, inner
        self._options = {
            "svd_niter": low_rank.svd_niter,
            "rescale": low_rank.rescale,
            "seed": seed,
        }

    @torch.no_grad()
    def fill(self, prefix: str, module: nn.Module, device: torch.device) -> None:
        """As in `Source`."""
        if not any(parameter.is_meta for parameter in module.parameters()):
            return
        dense = self._dense.get_submodule(prefix)
        self._inner.fill(prefix, dense, device)
        dense.to(device)
        decomposed: set[str] = set()
        for name, layer in dense.named_modules():
            if not (isinstance(layer, nn.Linear) or is_conv1d(layer)) or not name:
                continue
            weight = layer.weight.detach()
            bias = None if layer.bias is None else layer.bias.detach()
            fill(
                module.get_submodule(name),
                weight.T if is_conv1d(layer) else weight,
                bias,
                **self._options,
            )
            decomposed |= {f"{name}.{key}" for key, _ in layer.named_parameters()}
        for name, parameter in list(dense.named_parameters()):
            if name not in decomposed:
                loading.place(module, name, nn.Parameter(parameter.detach()))
        dense.to("meta")


@torch.no_grad()
def to_dense(model: Any, dense: Any) -> Any:
    """The low-rank `model` with W = B A in place of its factors, layer by layer and in place: a
    standard model of its family.

    `dense` is the dense skeleton of the same model, which gives each layer its class.
    """
    for name, plain in linear_layers(dense).items():
        weight, bias = dense_weight(model.get_submodule(name))
        values = {"weight": weight.T.contiguous() if is_conv1d(plain) else weight, "bias": bias}
        for key, value in values.items():
            parameter = None if value is None else nn.Parameter(value.detach().clone(), False)
            setattr(plain, key, parameter)
        model.set_submodule(name, plain)
    vars(model.config).pop(MARK, None)
    return model
