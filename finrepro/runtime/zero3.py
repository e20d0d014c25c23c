"""ZeRO stage 3 while a model is loaded: every part is sharded over the ranks as soon as it has its
weights, and sharded parameters are read and set.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn


def partition(part: "nn.Module", device: "torch.device") -> None:
    """Shard every parameter of `part` over the ranks, in place, as DeepSpeed's ZeRO-3 engine would
    later (Rajbhandari et al., 2020, arXiv 1910.02054): this rank keeps 1 / world_size of it. All
    ranks call it, in the same order.
    """
    from finrepro.catalogue.reader import deepspeed_config
    from finrepro.runtime import ranks

    deepspeed = ranks.start_deepspeed(device)
    settings = deepspeed_config(3)
    config: dict[str, Any] = settings | {
        # Else every call would replace torch's own linear function once more.
        "zero_optimization": settings["zero_optimization"] | {"memory_efficient_linear": False},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }
    deepspeed.zero.Init(
        module=part, config_dict_or_path=config, dtype=next(part.parameters()).dtype
    )


def whole(parameter: "nn.Parameter") -> "torch.Tensor":
    """A copy of the whole parameter, also of a sharded one: then every rank calls it, in the same
    order.
    """
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def fill(parameter: "nn.Parameter", value: "torch.Tensor") -> None:
    """Set a parameter of the model to this value, in place, also a sharded one; all ranks call it,
    with the same value.

    Of a trained one an engine may keep a copy of its own, from which it is overwritten:
    `finrepro.training.engine_view` sets both.
    """
    import torch

    with torch.no_grad():
        if not hasattr(parameter, "ds_id"):
            parameter.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)


def keep_whole(parameters: "Iterable[nn.Parameter]", inside: "nn.Module") -> None:
    """Have DeepSpeed gather these parameters, where they are sharded, for the whole forward and
    backward pass of the module `inside`.
    """
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            import deepspeed

            deepspeed.zero.register_external_parameter(inside, parameter)


def gather_with_their_layer(model: "nn.Module") -> None:
    """Have DeepSpeed gather the parameters that a layer holds in a dictionary or list together with
    the layer's own.

    Such a container is a module that is never called, and DeepSpeed gathers the parameters of a
    module when it is called.
    """
    from torch import nn

    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ParameterDict | nn.ParameterList):
                keep_whole(child.parameters(), module)
