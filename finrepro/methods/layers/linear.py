"""The linear layers of a transformer's blocks, of any class."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def is_conv1d(layer: "nn.Module") -> bool:
    """Whether the layer is GPT-2's `Conv1D`, a linear layer that stores its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def features(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, also where its weight is transposed, quantized or sharded."""
    return (layer.nx, layer.nf) if is_conv1d(layer) else (layer.in_features, layer.out_features)


def linear_layers(model: "nn.Module") -> dict[str, Any]:
    """Name -> layer for every linear layer inside the blocks; the output head and the embeddings
    are not among them.

    "All linear layers" in the sense of QLoRA: four a block in GPT-2, seven in Llama.
    """
    from torch import nn

    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: layer
        for name, layer in model.named_modules()
        if layer is not head and (isinstance(layer, nn.Linear) or is_conv1d(layer))
    }
