"""Full fine-tuning: every weight is trained. The reference that the adapters are compared with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro.settings import Choice, settings

if TYPE_CHECKING:
    from torch import nn

WHOLE_MODEL = True  # what is exported is a model by itself
NOT_EXPORTED = {"peft": "full fine-tuning changes every weight, which no adapter holds"}


@settings
class Config:
    """No settings."""


def supports(
    model: Any, quantizer: Choice, zero_stage: int, config: Config | None = None
) -> str | None:
    """None, or why the combination cannot run: rounded weights have no gradient."""
    return (
        None
        if quantizer.kind == "none"
        else f"full fine-tuning cannot train weights stored as {quantizer.name}"
    )


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: all of them."""
    return int(model.parameters)


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The same model with every parameter trainable."""
    return model.requires_grad_(True)


def export(model: "nn.Module", folder: Path) -> None:
    """The whole model as safetensors with its configuration, readable by `from_pretrained`."""
    model.save_pretrained(folder)  # type: ignore[operator]
