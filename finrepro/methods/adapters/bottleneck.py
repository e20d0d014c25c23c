"""Bottleneck adapters (Houlsby et al., 2019, arXiv 1902.00751): two small networks a block, and the
block's layer norms, are trained.

They stand behind the attention and the MLP sub-layer of every block, on what is then added to the
residual stream. The paper's BERT normalises after that sum, GPT-2 and Llama before the sub-layer;
the adapters' place is the same, and the trained norms are the block's two. A bottleneck is not
linear, so it cannot be merged into the weights, and the export has a format of its own.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro import bounds, strict_json
from finrepro.errors import EnvironmentFault, UsageError
from finrepro.settings import Choice, Positive, PositiveFloat, build, settings

if TYPE_CHECKING:
    from torch import nn

NOT_EXPORTED = {
    "peft": "PEFT has no bottleneck adapters (the run's weights/ is read by "
    "finrepro.methods.adapters.bottleneck alone)",
    "merged": "a bottleneck is not linear, and nothing folds it into the weights",
}
SETTINGS, WEIGHTS, FORMAT = "bottleneck.json", "bottleneck.safetensors", "finrepro bottleneck 1"


@settings
class Config:
    """`bottleneck_size` is the paper's m. With `zero_up` W_up starts at zero, so that nothing
    changes at first, not only almost nothing.
    """

    bottleneck_size: Positive
    init_std: PositiveFloat
    zero_up: bool
    train_layer_norms: bool


def supports(
    model: Any, quantizer: Choice, zero_stage: int, config: Config | None = None
) -> str | None:
    """None: it acts on activations, however the weights are stored."""
    return None


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: 2 (2 m d + m + d) a block, and its two layer
    norms.
    """
    from finrepro.sizes.shapes import depth

    shape, m = model.architecture, config.bottleneck_size
    gpt2 = model.family == "gpt2"
    d = shape["n_embd" if gpt2 else "hidden_size"]
    norms = (4 if gpt2 else 2) * d if config.train_layer_norms else 0  # GPT-2's have a bias
    return int(depth(model) * (2 * (2 * m * d + m + d) + norms))


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The model with its sub-layers, and the norms that are trained, wrapped in place, and
    everything else frozen.

    The weights are drawn from a generator of its own. At ZeRO-3 on several ranks all of them call
    it.
    """
    import torch

    from finrepro.methods.layers.bottleneck import BLOCKS, NORMS, SUBLAYERS, Bottleneck, TrainedNorm
    from finrepro.runtime.zero3 import whole

    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    of: Any = model.config
    blocks: Any = model.get_submodule(BLOCKS[of.model_type])
    for block in blocks:
        for name in SUBLAYERS[of.model_type]:
            sublayer = block.get_submodule(name)
            wrapped = Bottleneck(
                sublayer,
                of.hidden_size,
                config.bottleneck_size,
                config.init_std,
                config.zero_up,
                generator,
            )
            setattr(block, name, wrapped)
        for name in NORMS[of.model_type] if config.train_layer_norms else ():
            norm = block.get_submodule(name)
            for key, parameter in list(norm.named_parameters()):
                setattr(norm, key, torch.nn.Parameter(whole(parameter)))
            setattr(block, name, TrainedNorm(norm))
    return model


def _tensors(model: "nn.Module") -> dict[str, Any]:
    """Name -> parameter of the adapter, and of the norms that are trained with it."""
    from finrepro.methods.layers.bottleneck import Bottleneck, TrainedNorm

    tensors: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        names = (
            ("down", "up")
            if isinstance(module, Bottleneck)
            else ("norm",)
            if isinstance(module, TrainedNorm)
            else ()
        )
        for name in names:
            inner = module.get_submodule(name).named_parameters()
            tensors |= {f"{prefix}.{name}.{key}": parameter for key, parameter in inner}
    return tensors


def _size(model: Any) -> dict[str, Any]:
    """The name and sizes of a base, which an adapter read for it has to match."""
    sizes = {
        "family": model.config.model_type,
        "width": model.config.hidden_size,
        "blocks": model.config.num_hidden_layers,
    }
    return {"base_model_name_or_path": str(model.name_or_path), **sizes}


def export(model: "nn.Module", folder: Path) -> None:
    """Write the adapter's tensors, and a JSON with its settings and its base's name and sizes, for
    `read`.
    """
    from safetensors.torch import save_file

    from finrepro.methods.layers.bottleneck import Bottleneck, TrainedNorm

    first: Any = next(module for module in model.modules() if isinstance(module, Bottleneck))
    norms = any(isinstance(module, TrainedNorm) for module in model.modules())
    config = Config(
        bottleneck_size=first.size,
        init_std=first.init_std,
        zero_up=first.zero_up,
        train_layer_norms=norms,
    )
    save_file(
        {name: p.detach().cpu().contiguous() for name, p in _tensors(model).items()},
        folder / WEIGHTS,
    )
    values = {"format": FORMAT, "base": _size(model), "settings": dataclasses.asdict(config)}
    (folder / SETTINGS).write_text(strict_json.dumps(values, indent=2, sort_keys=True) + "\n")


def read(model: "nn.Module", folder: Path) -> "nn.Module":
    """`model`, an untouched base in whatever form it is stored, with the exported adapter of
    `folder` in place, frozen.

    Raises `EnvironmentFault` in one line when a file is missing or damaged, is not of this format,
    or is for a base of another name or size, and when a tensor is missing, unexpected, of another
    shape or not float32.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = bounds.read_json(folder / SETTINGS)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise EnvironmentFault(
            f"{folder}: the adapter cannot be read: {str(error).splitlines()[0]}."
        ) from None
    is_adapter = isinstance(values, dict) and set(values) == {"format", "base", "settings"}
    if not is_adapter or values["format"] != FORMAT or not isinstance(values["settings"], dict):
        raise EnvironmentFault(f"{folder / SETTINGS}: not an adapter of the format '{FORMAT}'.")
    if values["base"] != _size(model):
        raise EnvironmentFault(
            f"{folder}: the adapter is for {values['base']}, not for {_size(model)}."
        )
    try:
        config = build(Config, values["settings"], str(folder / SETTINGS))
    except UsageError as error:
        raise EnvironmentFault(str(error)) from None
    adapted = apply(model, config, 0)
    parameters = _tensors(adapted)
    misfits = [
        name
        for name in parameters.keys() & tensors.keys()
        if tensors[name].shape != parameters[name].shape or tensors[name].dtype != torch.float32
    ]
    for fault, names in (
        ("lacks", parameters.keys() - tensors.keys()),
        ("holds, without a place for it,", tensors.keys() - parameters.keys()),
        ("has another shape or dtype of", misfits),
    ):
        if names:
            raise EnvironmentFault(
                f"{folder / WEIGHTS}: {fault} {min(names)} and {len(names) - 1} more."
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return adapted.requires_grad_(False)
