"""The base model unchanged: nothing is added, nothing is trained. The lower reference of the
adapters.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro.settings import Choice, settings

if TYPE_CHECKING:
    from torch import nn

NOT_EXPORTED = dict.fromkeys(("peft", "merged"), "nothing was trained")


@settings
class Config:
    """No settings."""


def supports(
    model: Any, quantizer: Choice, zero_stage: int, config: Config | None = None
) -> str | None:
    """None: a model can be scored however it is stored."""
    return None


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: none."""
    return 0


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The same model with every parameter frozen."""
    return model.requires_grad_(False)


def export(model: "nn.Module", folder: Path) -> None:
    """Writes nothing: no weight of the model is new."""
