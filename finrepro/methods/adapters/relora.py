"""ReLoRA (Lialin et al., 2023, arXiv 2307.05695): pretraining through low-rank updates that are
merged into W again and again.

Every `reset_every` steps s B A is added to W, A is drawn anew and B is zero, most of the moments of
A and B are forgotten, and the learning rate rises from zero over a few steps. W is frozen in
between; embeddings, output head, norms and biases are trained throughout. The authors begin with
full-rank training, a quarter of all steps in their recipe; W is frozen here from the first step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from finrepro.methods.adapters import full, lora
from finrepro.settings import Choice, Count, Positive, PositiveFloat, Share, settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finrepro.methods.layers.relora import ReloraLinear
    from finrepro.methods.optimizer_view import OptimizerView

WHOLE_MODEL = True  # what is exported is a model by itself
NOT_EXPORTED = {"peft": "ReLoRA changes every weight, which no adapter holds"}
RESETS_MOMENTS = True  # the optimizer has to know how to zero its moments


@settings
class Config:
    """`r` is whole, or a share of each layer's shorter side, and `lora_scale` multiplies B A.
    `reset_every` is in optimizer steps, or a share of all; `restart_warmup` in steps, or a share
    of those between two resets. `keep_moments` is the share that a reset leaves."""

    r: Positive | Share
    lora_scale: PositiveFloat
    reset_every: Positive | Share
    restart_warmup: Count | Share
    keep_moments: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Literal["all-linear"] | tuple[str, ...]


def supports(model: Any, quantizer: Choice, zero_stage: int, config: Config) -> str | None:
    """None for a base in full precision, or why not: quantized weights, or a rank or targets
    that do not fit the model.
    """
    if quantizer.kind != "none":
        return f"ReLoRA on {quantizer.name}: it changes the dense weights"
    return lora.misfit(model, config.r if isinstance(config.r, int) else 1, config.target_modules)


def supports_training(train: Any, config: Config) -> str | None:
    """Why these training settings do not go with the resets, or None."""
    period = period_of(config, train.max_steps)
    if train.max_steps > period and warmup_of(config, train.max_steps) >= period:
        return (
            f"ReLoRA's restart_warmup {config.restart_warmup} leaves no step at the full rate "
            f"between resets every {period} steps"
        )
    return None


def period_of(config: Config, max_steps: int) -> int:
    """Steps from one reset to the next."""
    period = config.reset_every
    return period if isinstance(period, int) else max(1, round(period * max_steps))


def warmup_of(config: Config, max_steps: int) -> int:
    """Steps over which the rate rises after a reset."""
    rise = config.restart_warmup
    return rise if isinstance(rise, int) else round(rise * period_of(config, max_steps))


def lr_factor(step: int, config: Config, max_steps: int) -> float:
    """Linear from near 0 to 1 after each reset; 1 before the first, where the schedule has a
    warm-up of its own.
    """
    period, place = divmod(step, period_of(config, max_steps))
    rise = warmup_of(config, max_steps)
    return (place + 1) / rise if period and place < rise else 1.0


def rank_of(config: Config, inputs: int, outputs: int) -> int:
    """The rank of a layer of this size."""
    return config.r if isinstance(config.r, int) else max(1, round(config.r * min(inputs, outputs)))


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: all but the targeted weights (in, out), and r (in
    + out) beside each.
    """
    from finrepro.sizes.shapes import counted

    return int(model.parameters) + counted(
        model, config.target_modules, lambda i, o: rank_of(config, i, o) * (i + o) - i * o
    )


def exported_parameters(model: Any, config: Config, max_steps: int) -> int:
    """Numbers in the exported file: a dense model's."""
    return int(model.parameters)


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The model with each target wrapped, in place, its weight frozen, and everything else
    trainable. Every rank calls it.

    Raises `ValueError` when a target names no layer.
    """
    from finrepro.methods.layers.linear import features, linear_layers
    from finrepro.methods.layers.relora import ReloraLinear
    from finrepro.sizes.shapes import targeted_or_fail

    model.requires_grad_(True)
    for name, layer in targeted_or_fail(linear_layers(model), config.target_modules).items():
        layer.weight.requires_grad_(False)
        model.set_submodule(
            name,
            ReloraLinear(layer, name, rank_of(config, *features(layer)), config.lora_scale, seed),
        )
    return model


def after_step(view: "OptimizerView", config: Config, step: int, max_steps: int) -> None:
    """Merge and restart after every `reset_every` steps, but not after the last one. The
    optimizer's step counts go on, since one may serve a whole group.
    """
    period = period_of(config, max_steps)
    if (step + 1) % period or step + 1 >= max_steps:
        return
    for layer in layers_of(view.model):
        a, b = view.value(layer.lora_A), view.value(layer.lora_B)
        merged = layer.merged(a, b)
        if layer.exact is not None:
            layer.exact = merged.cpu()
        view.set_frozen(layer.base_layer.weight, layer.stored(merged))
        view.set(layer.lora_A, layer.drawn((step + 1) // period).to(a.device))
        view.set(layer.lora_B, b.zero_())
        for factor in (layer.lora_A, layer.lora_B):
            view.change_state(factor, lambda moments: largest(moments, config.keep_moments))


def largest(moments: "dict[str, Tensor]", keep: float) -> "dict[str, Tensor]":
    """The moments of a parameter, zero except where the first moment is among the share `keep` of
    largest magnitude.

    One mask serves both: a first moment without its second one would be divided by nearly zero.
    """
    import torch

    first = next(iter(moments.values())).flatten()
    order = first.abs().argsort(descending=True, stable=True)
    mask = torch.zeros_like(first).index_fill_(0, order[: int(keep * first.numel())], 1)
    return {name: value * mask.reshape(value.shape) for name, value in moments.items()}


def state(model: "nn.Module") -> dict[str, Any]:
    """Each W in float32. Every rank calls it, and holds all of them."""
    return {layer.name: layer.frozen().to("cpu", copy=True) for layer in layers_of(model)}


def load_state(model: "nn.Module", state: dict[str, Any]) -> None:
    """Restore what `state` returned. Every rank calls it."""
    from finrepro.runtime.zero3 import fill

    for layer in layers_of(model):
        frozen = state[layer.name]
        if layer.exact is not None:
            layer.exact = frozen
        fill(layer.base_layer.weight, layer.stored(frozen).to(layer.lora_A.device))


def export(model: "nn.Module", folder: Path) -> None:
    """The whole dense model, each W with its B A, as full fine-tuning writes it; the model
    itself is left as it was.
    """
    with _dense(model):
        full.export(model, folder)


def layers_of(model: "nn.Module") -> "list[ReloraLinear]":
    """The wrapped layers, in the model's order."""
    from finrepro.methods.layers.relora import ReloraLinear

    return [layer for layer in model.modules() if isinstance(layer, ReloraLinear)]


@contextmanager
def _dense(model: "nn.Module") -> Iterator[None]:
    """Inside, every wrapped layer is a plain one with W + s B A."""
    layers = layers_of(model)
    weights = [layer.base_layer.weight.data for layer in layers]
    for layer in layers:
        layer.base_layer.weight.data = layer.stored(
            layer.merged(layer.lora_A.detach(), layer.lora_B.detach())
        )
        model.set_submodule(layer.name, layer.base_layer)
    try:
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.base_layer.weight.data = weight
            model.set_submodule(layer.name, layer)
