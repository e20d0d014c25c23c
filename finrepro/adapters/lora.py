"""LoRA (Hu et al., 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x with A (r, in) and B (out, r) trained, W frozen.

Made by PEFT, so that what is exported is a plain PEFT folder. B starts at zero: the adapted model equals its base at first.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from finrepro.schema import Choice, Positive, settings

if TYPE_CHECKING:
    from torch import nn


@settings
class Config:
    """PEFT's names. `all-linear` is every linear layer of the blocks, never the embeddings or the output head."""

    r: Positive
    lora_alpha: Positive
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Literal["all-linear"] | tuple[str, ...]


def supports(model: Any, quantizer: Choice, zero_stage: int, config: Config | None = None) -> str | None:
    """None: LoRA goes with every quantizer and every ZeRO stage, since it only calls the base layer."""
    return None


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: r (in + out) for each linear layer of the blocks, when all of them are adapted."""
    return factors(model, config.r)


def factors(model: Any, r: int) -> int:
    """Numbers in the factors A and B of rank `r` beside every linear layer of the blocks of a catalogue entry."""
    shape = model.architecture
    if model.family == "gpt2":
        return int(r * shape["n_layer"] * 16 * shape["n_embd"])
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return int(r * shape["num_hidden_layers"] * (4 * width + 2 * (width + kv) + 3 * (width + inner)))


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The model with A and B added beside each target and everything else frozen.

    A is drawn from U(-1/sqrt(in), 1/sqrt(in)) (PEFT's and loralib's initialisation) under a private generator state.
    Raises `ValueError` when a target names no layer.
    """
    import peft
    import torch

    adapted = peft_settings(targets(model, config.target_modules), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, adapted)


def targets(model: "nn.Module", target_modules: str | tuple[str, ...]) -> dict[str, Any]:
    """Name -> layer of what is adapted. Raises `ValueError` when a target names no linear layer of the blocks."""
    from finrepro.layers.linear import linear_layers

    layers = linear_layers(model)
    wanted = None if isinstance(target_modules, str) else set(target_modules)
    found = {name: layer for name, layer in layers.items() if wanted is None or name.rsplit(".", 1)[-1] in wanted}
    absent = (wanted or set()) - {name.rsplit(".", 1)[-1] for name in found}
    if absent or not found:
        raise ValueError(f"no linear layer of the model is named {', '.join(sorted(absent)) or 'anything'}")
    return found


def peft_settings(layers: dict[str, Any], config: Any) -> Any:
    """PEFT's settings for LoRA on these layers, with the rank, scale and dropout of `config`."""
    import peft

    from finrepro.layers.linear import is_conv1d

    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        bias="none",
        target_modules=list(layers),
        fan_in_fan_out=any(is_conv1d(layer) for layer in layers.values()),
    )


def export(model: "nn.Module", folder: Path) -> None:
    """A plain PEFT folder.

    The embeddings are never adapted, and PEFT is not to ask the hub whether they are. Its model card is a form that nobody filled in.
    """
    model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
    (folder / "README.md").unlink(missing_ok=True)
    sort_settings(folder)


def sort_settings(folder: Path) -> None:
    """Write a PEFT folder's JSON in a fixed order: PEFT writes sets, whose order changes from process to process."""
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    values["target_modules"] = sorted(values["target_modules"])
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
