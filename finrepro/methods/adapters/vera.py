"""VeRA (Kopiczko et al., 2024, arXiv 2310.11454): y = W x + b * (B (d * (A x))), A and B random and
frozen, d (r,) and b (out,) trained.

One A (r, largest in) and one B (largest out, r) serve every layer, which takes a slice of its own
size. They are drawn from `projection_prng_key` and not from the cell's seed: cells of all seeds
train in the same random basis. Made by PEFT. b starts at zero: the adapted model equals its base at
first.
"""

import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from finrepro.methods.adapters.lora import export
from finrepro.settings import Choice, Count, Positive, PositiveFloat, settings

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Config", "apply", "export", "exported_parameters", "supports", "trainable_parameters"]


@settings
class Config:
    """PEFT's names. With `save_projection` the exported file holds A and B; without it a reader
    has to draw them again from the key.
    """

    r: Positive
    vera_dropout: Annotated[float, Field(ge=0, lt=1)]
    d_initial: PositiveFloat  # at 0 neither vector would ever have a gradient
    projection_prng_key: Count
    save_projection: bool
    target_modules: Literal["all-linear"] | tuple[str, ...]


def supports(model: Any, quantizer: Choice, zero_stage: int, config: Config) -> str | None:
    """None for every quantizer, since it only calls the base layer. ZeRO-3 over several devices
    is tested neither here nor in PEFT.
    """
    from finrepro.sizes.shapes import absent, block_sizes

    if reason := absent(block_sizes(model), config.target_modules):
        return reason
    return "VeRA has not been tested at ZeRO-3" if zero_stage == 3 else None


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: r + out for each adapted layer."""
    from finrepro.sizes.shapes import counted

    return counted(model, config.target_modules, lambda _, outputs: config.r + outputs)


def exported_parameters(model: Any, config: Config, max_steps: int) -> int:
    """Numbers in the exported file: A and B once as well, where they are saved."""
    from finrepro.sizes.shapes import block_sizes, targeted

    sizes = targeted(block_sizes(model), config.target_modules).values()
    shared = (
        config.r * (max(i for i, _ in sizes) + max(o for _, o in sizes))
        if config.save_projection
        else 0
    )
    return trainable_parameters(model, config) + shared


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The model with d and b beside each target and everything else frozen; `seed` has no effect.

    Raises `ValueError` when a target names no layer.
    """
    import peft
    import torch

    from finrepro.methods.layers.linear import is_conv1d, linear_layers
    from finrepro.sizes.shapes import targeted_or_fail

    adapted = targeted_or_fail(linear_layers(model), config.target_modules)
    with warnings.catch_warnings():
        # the settings' own choice
        warnings.filterwarnings("ignore", message="Specified to not save vera_A")
        settings = peft.VeraConfig(
            task_type="CAUSAL_LM",
            r=config.r,
            vera_dropout=config.vera_dropout,
            d_initial=config.d_initial,
            projection_prng_key=config.projection_prng_key,
            save_projection=config.save_projection,
            bias="none",
            target_modules=list(adapted),
            fan_in_fan_out=any(is_conv1d(layer) for layer in adapted.values()),
        )
    with torch.random.fork_rng(devices=[]):
        return peft.get_peft_model(model, settings)
