"""The adapter of IR-QLoRA (Qin et al., 2024, arXiv 2402.05445, section 3.3): LoRA whose two factors
have a shortcut each.

Means of neighbouring channels go past A and past B, each times a trained scalar that starts at
zero: two parameters a layer beside LoRA's. IR-QLoRA is this on the quantizer `icq`; it goes with
every other one as well. `finrepro.methods.layers.iec` has the equations.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from finrepro.methods.adapters import lora
from finrepro.settings import Choice, Positive, settings

if TYPE_CHECKING:
    from torch import nn


@settings
class Config:
    """LoRA's settings, with PEFT's names, and LoRA+'s ratio; the scalars need none."""

    r: Positive
    lora_alpha: Positive
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Literal["all-linear"] | tuple[str, ...]
    lr_ratio_b: Annotated[float, Field(ge=1, allow_inf_nan=False)]


def supports(model: Any, quantizer: Choice, zero_stage: int, config: Config) -> str | None:
    """None for every quantizer and ZeRO stage, since it only calls the base layer; or that rank
    or targets do not fit the model.
    """
    return lora.misfit(model, config.r, config.target_modules)


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: r (in + out) for each adapted layer, LoRA's, and
    two.
    """
    from finrepro.sizes.shapes import counted

    return counted(model, config.target_modules, lambda i, o: config.r * (i + o) + 2)


def exported_parameters(model: Any, config: Config, max_steps: int) -> int:
    """Numbers in the exported file: LoRA's, into which the scalars are folded."""
    from finrepro.sizes.shapes import counted

    return counted(model, config.target_modules, lambda i, o: config.r * (i + o))


def lr_scale(name: str, config: Config) -> float:
    """The factor to a parameter's learning rate: LoRA+'s ratio for B; 1 for A and for the
    scalars, of which LoRA+ says nothing.
    """
    return config.lr_ratio_b if name.endswith(".lora_B") else 1.0


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The model with each target replaced, in place, by a layer that wraps it, and everything else
    frozen.

    A is drawn as LoRA's, from a generator of its own. Raises `ValueError` when a target names no
    layer.
    """
    import torch

    from finrepro.methods.layers.iec import IECLinear
    from finrepro.methods.layers.linear import linear_layers
    from finrepro.sizes.shapes import targeted_or_fail

    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, layer in targeted_or_fail(linear_layers(model), config.target_modules).items():
        parent, _, child = name.rpartition(".")
        wrapped = IECLinear(layer, config.r, config.lora_alpha, config.lora_dropout, generator)
        setattr(model.get_submodule(parent), child, wrapped)
    return model


def export(model: "nn.Module", folder: Path) -> None:
    """A plain PEFT folder with the folded factors, which needs nothing of this package to be
    loaded.

    It computes what the model computes in evaluation, up to the rounding of a sum in float32; the
    scalars are part of the factors there.
    """
    from finrepro.methods.layers.iec import IECLinear
    from finrepro.methods.layers.linear import is_conv1d

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, IECLinear)}
    first = next(iter(layers.values()))
    factors = {name: layer.folded() for name, layer in layers.items()}
    lora.export_factors(
        model,
        folder,
        factors,
        first.r,
        first.lora_alpha,
        lora_dropout=first.lora_dropout,
        fan_in_fan_out=any(is_conv1d(layer.base_layer) for layer in layers.values()),
    )
