"""LoRA (Hu et al., 2021, arXiv 2106.09685): y = W x + s B A x with A (r, in) and B (out, r)
trained, W frozen, s = alpha / r.

Variants are settings. rsLoRA (Kalajdzievski, 2023, arXiv 2312.03732): s = alpha / sqrt(r). LoRA+
(Hayou et al., 2024, arXiv 2402.12354): B learns `lr_ratio_b` times as fast as A. DoRA (Liu et al.,
2024, arXiv 2402.09353, section 4): y = W' x with W' = m (W + s B A) / ||W + s B A||, the norm taken
over each row of W as (out, in) and m (out,) trained, at first ||W||; no gradient flows through the
norm (section 4.3).

Made by PEFT, so that what is exported is a plain PEFT folder. B starts at zero: the adapted model
equals its base at first.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from finrepro import bounds, strict_json
from finrepro.kinds import quantizer_of
from finrepro.settings import Choice, Positive, settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

PREFIX = "base_model.model."  # PEFT's, before the name that a layer has in the model


@settings
class Config:
    """PEFT's names. `all-linear` is every linear layer of the blocks, never the embeddings or
    the output head.
    """

    r: Positive
    lora_alpha: Positive
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Literal["all-linear"] | tuple[str, ...]
    use_rslora: bool
    use_dora: bool
    lr_ratio_b: Annotated[float, Field(ge=1, allow_inf_nan=False)]


def supports(model: Any, quantizer: Choice, zero_stage: int, config: Config) -> str | None:
    """None for every quantizer, or why not: the settings do not fit the model's layers, or DoRA
    cannot read the base's weights.

    LoRA only calls the base layer. DoRA reads its weight, also a quantized one, so it is refused
    where a quantizer stores a part of the weight elsewhere, and where ZeRO-3 has sharded it.
    """
    if config.use_dora and (apart := quantizer_of(quantizer).KEPT_APART):
        return f"DoRA reads the base's weights, from which {quantizer.name} keeps {apart} apart"
    if config.use_dora and zero_stage == 3:
        return "DoRA reads the base's weights, which ZeRO-3 keeps in parts"
    return misfit(model, config.r, config.target_modules)


def not_compiled(config: Config) -> str | None:
    """None, or that PEFT's DoRA inspects the class of its weights in the forward pass."""
    return (
        "PEFT's DoRA inspects its weights as Python objects, which torch.compile does not take"
        if config.use_dora
        else None
    )


def misfit(model: Any, r: int, target_modules: str | tuple[str, ...]) -> str | None:
    """Why factors of rank `r` cannot stand beside these layers of a catalogue entry, or None."""
    from finrepro.sizes.shapes import absent, block_sizes, targeted

    sizes = block_sizes(model)
    if reason := absent(sizes, target_modules):
        return reason
    for name, (inputs, outputs) in targeted(sizes, target_modules).items():
        if r > min(inputs, outputs):
            return (
                f"rank {r} is more than {model.name} can have in {name}, "
                f"{inputs} in and {outputs} out"
            )
    return None


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: r (in + out) for each adapted layer, and with
    DoRA its out.
    """
    from finrepro.sizes.shapes import counted

    return counted(
        model,
        config.target_modules,
        lambda i, o: config.r * (i + o) + (o if config.use_dora else 0),
    )


def lr_scale(name: str, config: Config) -> float:
    """The factor to a parameter's learning rate: LoRA+'s ratio for B; 1 for A, and for DoRA's m,
    of which LoRA+ says nothing.
    """
    return config.lr_ratio_b if ".lora_B." in name else 1.0


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The model with A and B (and m) added beside each target and everything else frozen.

    A is drawn from U(-1/sqrt(in), 1/sqrt(in)) (PEFT's and loralib's initialisation) under a private
    generator state. Raises `ValueError` when a target names no layer.
    """
    import peft
    import torch

    from finrepro.methods.layers.linear import linear_layers
    from finrepro.sizes.shapes import targeted_or_fail

    layers = targeted_or_fail(linear_layers(model), config.target_modules)
    adapted = peft_settings(layers, config, use_rslora=config.use_rslora, use_dora=config.use_dora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, adapted)


def plain(r: int, lora_alpha: int, target_modules: str | tuple[str, ...]) -> Config:
    """Settings of LoRA without dropout and without a variant."""
    variants: Any = {"use_rslora": False, "use_dora": False, "lr_ratio_b": 1.0}
    targets: Any = target_modules
    return Config(r=r, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules=targets, **variants)


def apply_from(
    model: "nn.Module", config: Config, seed: int, prepared: dict[str, Any], method: str
) -> "nn.Module":
    """As `apply`, but A and B of each target begin as the `lora_A` (r, in) and `lora_B` (out, r)
    that a first stage `prepared` for it.

    Raises `ValueError` with the name of the `method` when the first stage has left out a target:
    its base is not the method's.
    """
    import torch

    from finrepro.methods.layers.linear import linear_layers
    from finrepro.sizes.shapes import targeted_or_fail

    layers = targeted_or_fail(linear_layers(model), config.target_modules)
    missing = [name for name in layers if name not in prepared]
    if missing:
        base = "base" if layers[missing[0]].weight.dtype.is_floating_point else "quantized base"
        raise ValueError(
            f"{method} on a {base} without the first stage: "
            f"{missing[0]} and {len(missing) - 1} more"
        )
    adapted: Any = apply(model, config, seed)
    with torch.no_grad():
        for name in layers:
            layer = adapted.get_submodule(f"{PREFIX}{name}")
            for key in ("lora_A", "lora_B"):
                getattr(layer, key).default.weight.copy_(prepared[name][key])
    return adapted


def peft_settings(layers: dict[str, Any], config: Any, **variants: bool) -> Any:
    """PEFT's settings for LoRA on these layers, with the rank, scale and dropout of `config`."""
    import peft

    from finrepro.methods.layers.linear import is_conv1d

    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        bias="none",
        target_modules=list(layers),
        fan_in_fan_out=any(is_conv1d(layer) for layer in layers.values()),
        **variants,
    )


def export(model: "nn.Module", folder: Path) -> None:
    """A plain PEFT folder.

    `save_embedding_layers=False` keeps PEFT from asking the hub about embeddings, which are never
    adapted. PEFT's model card, an empty form, is removed.
    """
    model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
    (folder / "README.md").unlink(missing_ok=True)
    sort_settings(folder)


def export_factors(
    model: Any,
    folder: Path,
    factors: "Mapping[str, tuple[Tensor, Tensor]]",
    r: int,
    lora_alpha: int,
    **settings: Any,
) -> None:
    """A plain PEFT folder of a LoRA with these factors: layer -> A (r, in) and B (out, r).
    `settings` replace others of PEFT's.
    """
    import peft
    from safetensors.torch import save_file

    tensors = {
        f"{PREFIX}{name}.lora_{key}.weight": factor.detach().cpu().contiguous()
        for name, pair in factors.items()
        for key, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    written = peft.LoraConfig(
        **common | {"r": r, "lora_alpha": lora_alpha, "target_modules": list(factors)} | settings,
        base_model_name_or_path=str(model.name_or_path),
    )
    written.save_pretrained(folder)
    sort_settings(folder)


def sort_settings(folder: Path) -> None:
    """Write a PEFT folder's JSON in a fixed order: PEFT writes sets, whose order changes from
    process to process.
    """
    path = folder / "adapter_config.json"
    values = bounds.read_json(path)
    values["target_modules"] = sorted(values["target_modules"])
    path.write_text(strict_json.dumps(values, indent=2, sort_keys=True) + "\n")
