"""PiSSA (Meng et al., 2024, arXiv 2404.02948): LoRA that starts from the weight's principal part,
beside a frozen residual.

W = U S V^T. A = sqrt(S_r / s) V_r^T (r, in) and B = U_r sqrt(S_r / s) (out, r) are trained, with s
= alpha / r as in LoRA, and the base stores W_res = W - s B A in its own dtype: y = W_res x + s B A
x, at first W x. On a quantized base (QPiSSA) W_res is what is quantized, so `prepare` computes it
in a first stage. There is no dropout: it would drop a part of W.

What is exported is the change against W, a plain LoRA of rank 2 r: s (B A - B_0 A_0) = s [B, -B_0]
[A; A_0].
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finrepro import bounds, strict_json
from finrepro.kinds import quantizer_of
from finrepro.methods.adapters import lora
from finrepro.settings import Choice, Count, Positive, settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


@settings
class Config:
    """PEFT's names. `svd_niter`: iterations of a randomised decomposition (PEFT's
    `pissa_niter_N`), null for the full one.
    """

    r: Positive
    lora_alpha: Positive
    svd_niter: Count | None
    target_modules: Literal["all-linear"] | tuple[str, ...]


def supports(model: Any, quantizer: Choice, zero_stage: int, config: Config) -> str | None:
    """None for every quantizer and ZeRO stage, or that rank or targets do not fit the model.

    At ZeRO-3 a block is prepared before it is sharded; after that the base layer is only called.
    """
    return lora.misfit(model, config.r, config.target_modules)


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: LoRA's."""
    return lora.trainable_parameters(model, _as_lora(config))


def exported_parameters(model: Any, config: Config, max_steps: int) -> int:
    """Numbers in the exported file: A_0 and B_0 as well."""
    return 2 * trainable_parameters(model, config)


def prepare(
    name: str, weight: "Tensor", quantized: "Callable[[Tensor], Tensor]", config: Config, seed: int
) -> tuple["Tensor", dict[str, "Tensor"]]:
    """W_res of a weight (out, in) in float32, and the A and B of its principal part."""
    from finrepro.methods.layers.principal import principal_factors

    scale = config.lora_alpha / config.r
    unscaled_a, unscaled_b = principal_factors(weight, config.r, config.svd_niter, seed)
    a, b = unscaled_a / scale**0.5, unscaled_b / scale**0.5
    return residual(weight, a, b, scale), {"lora_A": a, "lora_B": b}


def residual(weight: "Tensor", a: "Tensor", b: "Tensor", scale: float) -> "Tensor":
    """W - s B A (out, in): from W and the exported A_0 and B_0 it is W_res to the last bit,
    where the same library computes it.
    """
    return weight - scale * (b @ a)


def apply(model: "nn.Module", config: Config, seed: int, prepared: dict[str, Any]) -> "nn.Module":
    """The model, whose layers hold W_res, with A and B beside each target and everything else
    frozen; `seed` has no effect.

    A_0 and B_0 stay in non-persistent buffers for the export: a resumed run prepares them again.
    Raises `ValueError` when a target names no layer, or has not been through the first stage.
    """
    adapted: Any = lora.apply_from(model, _as_lora(config), seed, prepared, "PiSSA")
    for name, own in prepared.items():
        layer = adapted.get_submodule(f"{lora.PREFIX}{name}")
        device = layer.lora_A.default.weight.device
        for key in ("lora_A", "lora_B"):
            layer.register_buffer(f"initial_{key}", own[key].to(device), persistent=False)
    return adapted


def export(model: "nn.Module", folder: Path) -> None:
    """A plain PEFT folder for the original weights, of rank 2 r and twice the alpha, so that s is
    the same.

    The first r rows of A (columns of B) are the trained ones. Where the base was quantized the
    trained model is q(W_res) + s B A, and what the file makes of W differs from it by the rounding
    of W_res; W_res itself is W + s [-B_0] A_0, from the other halves.
    """
    import torch

    layers: dict[str, Any] = {
        name.removeprefix(lora.PREFIX): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "initial_lora_A")
    }
    factors = {
        name: (
            torch.cat([layer.lora_A.default.weight.detach().cpu(), layer.initial_lora_A.cpu()], 0),
            torch.cat([layer.lora_B.default.weight.detach().cpu(), -layer.initial_lora_B.cpu()], 1),
        )
        for name, layer in layers.items()
    }
    first: Any = next(iter(layers.values()))
    base: Any = model
    # as the original layers store their weights, however the base was quantized
    transposed = base.config.model_type == "gpt2"
    r, alpha = 2 * first.r["default"], 2 * first.lora_alpha["default"]
    lora.export_factors(model, folder, factors, r, alpha, fan_in_fan_out=transposed)


def own_base(quantizer: Choice, config: Config) -> str | None:
    """Why the base of a run is not the quantized W: it is q(W_res). None for a base in full
    precision, where W and the exported change suffice.
    """
    if quantizer_of(quantizer).linear is None:
        return None
    return "it is what PiSSA's first stage has left of the weights, quantized"


def on_own_base(weights: Path, folder: Path) -> Path:
    """Write the trained half of an exported file to `folder`: a PEFT folder of rank r for the base
    W_res.
    """
    from safetensors.torch import load_file, save_file

    settings = bounds.read_json(weights / "adapter_config.json")
    r = settings["r"] // 2
    halves = {
        name: (factor[:r] if ".lora_A." in name else factor[:, :r]).contiguous()
        for name, factor in load_file(weights / "adapter_model.safetensors").items()
    }
    save_file(halves, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # quantized layers store (out, in)
    settings |= {"r": r, "lora_alpha": settings["lora_alpha"] // 2, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(
        strict_json.dumps(settings, indent=2, sort_keys=True) + "\n"
    )
    return folder


def _as_lora(config: Config) -> lora.Config:
    return lora.plain(config.r, config.lora_alpha, config.target_modules)
