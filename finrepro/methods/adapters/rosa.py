"""ROSA (Hameed et al., 2024, arXiv 2407.07802, "Random Subspace Adaptation"): trained factors that
begin as singular directions of W.

Every `resample_every` steps the trained factors are merged into the frozen weight, the sum is
factored anew, other directions are drawn and the optimizer's moments are zeroed; the learning
rate's schedule goes on. `finrepro.methods.layers.rosa` has the equations.

It needs the dense weight at every resample, so a quantized base is refused. With several ranks each
factors its share of the layers and broadcasts the result, so that all hold the same bits even where
an SVD is not reproducible.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finrepro.methods.adapters import lora
from finrepro.settings import Choice, Positive, settings

RESETS_MOMENTS = True  # the optimizer has to know how to zero its moments

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finrepro.methods.layers.rosa import Factors, NextPeriod, RosaLinear
    from finrepro.methods.optimizer_view import OptimizerView


@settings
class Config:
    """`resample_every` counts optimizer steps. `random` is the method; `top`, once, begins as PiSSA
    does.

    Gauge `sqrt` is the paper's split of the product, `code` that of its authors' code.
    """

    r: Positive
    resample_every: Positive
    selection: Literal["random", "top", "bottom"]
    gauge: Literal["sqrt", "code"]
    target_modules: Literal["all-linear"] | tuple[str, ...]


def supports(model: Any, quantizer: Choice, zero_stage: int, config: Config) -> str | None:
    """None for a base in full precision, or why not: quantized weights, or a rank or targets
    that do not fit the model.
    """
    if quantizer.kind != "none":
        return f"ROSA on {quantizer.name}: it needs the dense weight at every resample"
    return lora.misfit(model, config.r, config.target_modules)


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: r (in + out) for each adapted layer, as LoRA's."""
    from finrepro.sizes.shapes import counted

    return counted(model, config.target_modules, lambda i, o: config.r * (i + o))


def exported_parameters(model: Any, config: Config, max_steps: int) -> int:
    """Numbers in the exported file: every period's factors before training and after it."""
    periods = max(1, -(-max_steps // config.resample_every))
    return 2 * periods * trainable_parameters(model, config)


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The model with each target wrapped, in place, by a layer in its first period, and everything
    else frozen.

    Every rank calls it. Raises `ValueError` when a target names no layer.
    """
    from finrepro.methods.layers.linear import linear_layers
    from finrepro.methods.layers.rosa import RosaLinear
    from finrepro.sizes.shapes import targeted_or_fail

    model.requires_grad_(False)
    for name, layer in targeted_or_fail(linear_layers(model), config.target_modules).items():
        parent, _, child = name.rpartition(".")
        wrapped = RosaLinear(layer, name, config.r, config.selection, config.gauge, seed)
        setattr(model.get_submodule(parent), child, wrapped)
    layers = layers_of(model)
    starts = _begin_period(layers, lambda layer, frozen: layer.next_period(frozen, None))
    for layer, start in zip(layers, starts, strict=True):
        layer.start = start.copy()
        layer.lora_A.data.copy_(start.a)
        layer.lora_B.data.copy_(start.b)
    return model


def after_step(view: "OptimizerView", config: Config, step: int, max_steps: int) -> None:
    """Begin the next period after every `resample_every` steps, but not after the last one.

    The moments of A and B are zeroed; their learning rate goes on.
    """
    if (step + 1) % config.resample_every or step + 1 >= max_steps:
        return
    from finrepro.methods.layers.rosa import Factors, Period

    layers = layers_of(view.model)
    trained = {
        layer: Factors(view.value(layer.lora_A), view.value(layer.lora_B)) for layer in layers
    }
    starts = _begin_period(layers, lambda layer, frozen: layer.next_period(frozen, trained[layer]))
    for layer, start in zip(layers, starts, strict=True):
        layer.history.append(Period(_start_of(layer), trained[layer].copy()))
        layer.start = start.copy()
        view.set(layer.lora_A, start.a)
        view.set(layer.lora_B, start.b)
    view.reset_state([parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)])


def state(model: "nn.Module") -> dict[str, Any]:
    """Layer -> the factors of its finished periods, and those with which the present one began."""
    return {
        layer.name: {
            "history": [[*start, *end] for start, end in layer.history],
            "start": [*_start_of(layer)],
        }
        for layer in layers_of(model)
    }


def load_state(model: "nn.Module", state: dict[str, Any]) -> None:
    """Restore what `state` returned, in a model fresh from `apply`: W_f goes through the same sums
    again. Every rank calls it.
    """
    from finrepro.methods.layers.rosa import Factors, Period

    layers = layers_of(model)
    computed = {layer: _start_of(layer) for layer in layers}
    for layer in layers:
        recorded = state[layer.name]
        layer.history = [
            Period(Factors(*period[:2]).copy(), Factors(*period[2:]).copy())
            for period in recorded["history"]
        ]
        layer.start = Factors(*recorded["start"]).copy()
    _begin_period(layers, lambda layer, frozen: layer.replay(frozen, computed[layer]))


def export(model: "nn.Module", folder: Path) -> None:
    """A plain PEFT folder for the original base: a LoRA of scale 1 and rank 2 r T after T periods,
    which needs nothing of this package.

    Where 2 r T exceeds the full rank of a layer, the file is correct and larger than the dense
    layer.
    """
    from finrepro.methods.layers.linear import is_conv1d

    layers = layers_of(model)
    rank = 2 * layers[0].r * (len(layers[0].history) + 1)
    transposed = any(is_conv1d(layer.base_layer) for layer in layers)
    factors = {layer.name: layer.as_lora() for layer in layers}
    lora.export_factors(model, folder, factors, rank, rank, fan_in_fan_out=transposed)


def layers_of(model: "nn.Module") -> "list[RosaLinear]":
    """The adapted layers, in the model's order."""
    from finrepro.methods.layers.rosa import RosaLinear

    return [layer for layer in model.modules() if isinstance(layer, RosaLinear)]


def _start_of(layer: "RosaLinear") -> Any:
    assert layer.start is not None
    return layer.start


def _begin_period(
    layers: "list[RosaLinear]", compute: "Callable[[RosaLinear, Tensor], NextPeriod]"
) -> "list[Factors]":
    """Replace every layer's W_f by the one that `compute` gives; returns the factors subtracted
    from each.

    Every rank calls it. The k-th of n ranks computes the layers k, k + n, k + 2 n ... and
    broadcasts them.
    """
    from finrepro.runtime import ranks
    from finrepro.runtime.zero3 import whole

    this, starts = ranks.current(), []
    if this.world_size > 1:
        ranks.start_process_group(layers[0].lora_A.device)
    for first in range(0, len(layers), this.world_size):
        group = layers[first : first + this.world_size]
        weight = None
        for owner, layer in enumerate(group):  # a gathering, which every rank has to join
            gathered = whole(layer.base_layer.weight)
            weight = gathered if owner == this.rank else weight
        period = None
        if weight is not None:
            layer = group[this.rank]
            period = compute(layer, layer.frozen(weight))
        starts += [
            _broadcast(layer, period if owner == this.rank else None, owner)
            for owner, layer in enumerate(group)
        ]
    return starts


def _broadcast(layer: "RosaLinear", period: "NextPeriod | None", owner: int) -> "Factors":
    """Set a layer's W_f to what the rank `owner` has computed, `period` there and None elsewhere;
    every rank calls it.
    """
    import torch.distributed as dist

    from finrepro.runtime import ranks
    from finrepro.runtime.zero3 import fill

    weight = layer.base_layer.weight
    frozen, start = (
        layer.empty_like(weight) if period is None else layer.as_stored(period, weight.dtype)
    )
    if ranks.current().world_size > 1:
        for tensor in (frozen, *start):
            dist.broadcast(tensor, src=owner)
    fill(weight, frozen)
    return start
