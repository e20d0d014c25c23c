"""ROSA (Hameed et al., 2024, arXiv 2407.07802, "Random Subspace Adaptation"): trained factors that
begin as singular directions of W.

Every `resample_every` steps what was learned is merged into the frozen weight, the sum is factored
anew, other directions are drawn and the optimizer forgets the old ones; the learning rate's
schedule goes on. `finrepro.methods.layers.rosa` has the equations.

It needs the dense weight at every resample, so a quantized base is refused. With several ranks each
factors its share of the layers and sends the others the result: they hold the same bits, also where
an SVD would not give the same twice.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finrepro.methods.adapters import lora
from finrepro.settings import Choice, Positive, settings

RESETS_MOMENTS = True  # an optimizer has to know how to begin anew

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finrepro.methods.layers.rosa import Factors, Opened, RosaLinear
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
    """Numbers in the exported file: of every period the factors at its beginning and at its end."""
    periods = max(1, -(-max_steps // config.resample_every))
    return 2 * periods * trainable_parameters(model, config)


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The model with each target replaced, in place, by a layer that wraps it and is in its first
    period, and everything else frozen.

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
    for layer, start in zip(
        layers, _open(layers, lambda layer, frozen: layer.opened(frozen, None)), strict=True
    ):
        layer.start = start.copy()
        layer.lora_A.data.copy_(start.a)
        layer.lora_B.data.copy_(start.b)
    return model


def after_step(view: "OptimizerView", config: Config, step: int, max_steps: int) -> None:
    """Open the next period after every `resample_every` steps, but not after the last one.

    The moments of A and B begin anew, their learning rate goes on.
    """
    if (step + 1) % config.resample_every or step + 1 >= max_steps:
        return
    from finrepro.methods.layers.rosa import Factors, Period

    layers = layers_of(view.model)
    trained = {
        layer: Factors(view.value(layer.lora_A), view.value(layer.lora_B)) for layer in layers
    }
    starts = _open(layers, lambda layer, frozen: layer.opened(frozen, trained[layer]))
    for layer, start in zip(layers, starts, strict=True):
        layer.history.append(Period(_started(layer), trained[layer].copy()))
        layer.start = start.copy()
        view.set(layer.lora_A, start.a)
        view.set(layer.lora_B, start.b)
    view.reset_state([parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)])


def state(model: "nn.Module") -> dict[str, Any]:
    """Of each layer the factors of its periods, and those with which the present one began."""
    return {
        layer.name: {
            "history": [[*start, *end] for start, end in layer.history],
            "start": [*_started(layer)],
        }
        for layer in layers_of(model)
    }


def load_state(model: "nn.Module", state: dict[str, Any]) -> None:
    """Take up what `state` gave, in a model that `apply` has just made: W_f goes through the
    same sums again. Every rank calls it.
    """
    from finrepro.methods.layers.rosa import Factors, Period

    layers = layers_of(model)
    made = {layer: _started(layer) for layer in layers}
    for layer in layers:
        kept = state[layer.name]
        layer.history = [
            Period(Factors(*each[:2]).copy(), Factors(*each[2:]).copy()) for each in kept["history"]
        ]
        layer.start = Factors(*kept["start"]).copy()
    _open(layers, lambda layer, frozen: layer.replayed(frozen, made[layer]))


def export(model: "nn.Module", folder: Path) -> None:
    """A plain PEFT folder for the original base: a LoRA of scale 1 and rank 2 r T after T periods,
    which needs nothing of this package.

    Where 2 r T is more than a layer's own rank the file is larger than the layer would be, and as
    right.
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


def _started(layer: "RosaLinear") -> Any:
    assert layer.start is not None
    return layer.start


def _open(
    layers: "list[RosaLinear]", compute: "Callable[[RosaLinear, Tensor], Opened]"
) -> "list[Factors]":
    """Give every layer the W_f that `compute` makes of the one it has; the factors that were taken
    out of each.

    Every rank calls it. It computes one layer of each so many, and sends the result to the others.
    """
    from finrepro.runtime import ranks
    from finrepro.runtime.zero3 import whole

    here, starts = ranks.current(), []
    if here.world_size > 1:
        ranks.start_process_group(layers[0].lora_A.device)
    for first in range(0, len(layers), here.world_size):
        group = layers[first : first + here.world_size]
        opened = None
        for place, layer in enumerate(group):
            weight = whole(layer.base_layer.weight)
            if place == here.rank:
                mine, kept = layer, weight
        if here.rank < len(group):
            opened = compute(mine, mine.frozen(kept))
        starts += [
            _receive(layer, opened if place == here.rank else None, place)
            for place, layer in enumerate(group)
        ]
    return starts


def _receive(layer: "RosaLinear", opened: "Opened | None", owner: int) -> "Factors":
    """Set a layer's W_f to what the rank `owner` has computed; every rank calls it."""
    import torch.distributed as dist

    from finrepro.runtime import ranks
    from finrepro.runtime.zero3 import fill

    weight = layer.base_layer.weight
    frozen, start = layer.room(weight) if opened is None else layer.kept(opened, weight.dtype)
    if ranks.current().world_size > 1:
        for each in (frozen, *start):
            dist.broadcast(each, src=owner)
    fill(weight, frozen)
    return start
