"""LoftQ (Li et al., 2023, arXiv 2310.08659, algorithm 1): LoRA whose factors start from the
quantization error of the weight.

From A_0 = B_0 = 0, for t = 1 ... T: Q_t = q(W - B_{t-1} A_{t-1}), and B_t A_t is the principal part
of rank r of W - Q_t, halved as A = sqrt(S_r) V_r^T (r, in) and B = U_r sqrt(S_r) (out, r). Q_T is
the base, A_T and B_T are trained: y = Q_T x + B A x, at first nearer to W x than q(W) x is. q is
the cell's own quantizer with its own settings. The scaling is 1: with another one Q_T + s B A would
not approximate W.
"""

from typing import TYPE_CHECKING, Any, Literal

from finrepro.methods.adapters import lora
from finrepro.methods.adapters.lora import export
from finrepro.settings import Choice, Count, Positive, settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

__all__ = ["Config", "apply", "export", "own_base", "prepare", "supports", "trainable_parameters"]


@settings
class Config:
    """PEFT's names. `loftq_iter` is T; `svd_niter`: iterations of a randomised decomposition,
    null for the full one.
    """

    r: Positive
    lora_alpha: Positive
    loftq_iter: Positive
    svd_niter: Count | None
    target_modules: Literal["all-linear"] | tuple[str, ...]

    def __post_init__(self) -> None:
        if self.lora_alpha != self.r:
            raise ValueError(
                f"LoftQ's scaling must be 1: lora_alpha is {self.lora_alpha}, "
                f"it has to be r, which is {self.r}"
            )


def supports(model: Any, quantizer: Choice, zero_stage: int, config: Config) -> str | None:
    """None for every quantizer in 4 bits and every ZeRO stage; or that there is no quantization
    error to compensate, or that rank or targets do not fit.

    LLM.int8 also rounds every input, about as coarsely as its weights; no fixed factors can
    compensate that.
    """
    unfit = {"none": "takes nothing", "bnb_int8": "rounds every input as well"}
    if quantizer.kind in unfit:
        return (
            "LoftQ makes up for what a quantizer takes from the weights; "
            f"{quantizer.name} {unfit[quantizer.kind]}"
        )
    return lora.misfit(model, config.r, config.target_modules)


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: LoRA's."""
    return lora.trainable_parameters(model, _as_lora(config))


def prepare(
    name: str, weight: "Tensor", quantized: "Callable[[Tensor], Tensor]", config: Config, seed: int
) -> tuple["Tensor", dict[str, "Tensor"]]:
    """W - B_{T-1} A_{T-1} of a weight (out, in) in float32, of which the loader makes Q_T, and
    A_T and B_T.
    """
    from finrepro.methods.layers.principal import principal_factors

    def compensation(target: "Tensor") -> tuple["Tensor", "Tensor"]:
        return principal_factors(weight - quantized(target), config.r, config.svd_niter, seed)

    target = weight
    a, b = compensation(target)
    for _ in range(config.loftq_iter - 1):
        target = weight - b @ a
        a, b = compensation(target)
    return target, {"lora_A": a, "lora_B": b}


def apply(model: "nn.Module", config: Config, seed: int, prepared: dict[str, Any]) -> "nn.Module":
    """The model, whose layers hold Q_T, with A and B beside each target and everything else frozen;
    `seed` has no effect.

    Raises `ValueError` when a target names no layer, or has not been through the first stage.
    """
    return lora.apply_from(model, _as_lora(config), seed, prepared, "LoftQ")


def own_base(quantizer: Choice, config: Config) -> str:
    """Why the base of a run is not the quantized W."""
    return "its codes are LoftQ's, which make room for what the adapter starts from"


def _as_lora(config: Config) -> lora.Config:
    return lora.plain(config.r, config.lora_alpha, config.target_modules)
