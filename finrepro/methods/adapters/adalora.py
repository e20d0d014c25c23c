"""AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): y = W x + s P Lambda Q x with P (out, r), Lambda
diagonal and Q (r, in) trained, W frozen, s = alpha / init_r. During training the triplets of least
importance are pruned (their Lambda is set to zero), until target_r a layer remain on average.

The layers are PEFT's, so that what is exported is a plain PEFT folder; importance, budget and
regulariser are computed here, from the paper's equations: PEFT's own code reads `.grad`, which
ZeRO does not fill. Lambda starts at zero: the model equals its base at first.
"""

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from finrepro.methods.adapters.lora import export, misfit
from finrepro.settings import Choice, Count, Positive, Share, settings

# `export` writes every triplet, the pruned ones with a Lambda of zero. PEFT can leave them out
# (`rank_pattern`), and when it reads such a file it warns, wrongly, that it ignores the pattern.
__all__ = [
    "Config",
    "after_step",
    "apply",
    "before_step",
    "export",
    "extra_loss",
    "load_state",
    "state",
    "supports",
    "supports_training",
    "trainable_parameters",
]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from finrepro.methods.optimizer_view import OptimizerView

FACTORS = {"P": "lora_B", "E": "lora_E", "Q": "lora_A"}


@settings
class Config:
    """PEFT's names. `tinit` and `tfinal` are optimizer steps, or shares of all of them where
    they lie between 0 and 1.
    """

    init_r: Positive
    target_r: Positive
    lora_alpha: Positive
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    tinit: Count | Share
    tfinal: Count | Share
    deltaT: Positive  # noqa: N815  (PEFT's name)
    beta1: Share
    beta2: Share
    orth_reg_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    target_modules: Literal["all-linear"] | tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises `ValueError` for a budget that grows."""
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r {self.target_r} is more than init_r {self.init_r}: "
                "triplets are taken away, never added"
            )


def supports(model: Any, quantizer: Choice, zero_stage: int, config: Config) -> str | None:
    """None for every quantizer, since it only calls the base layer, or why the rank does not fit
    the model's layers.
    """
    return misfit(model, config.init_r, config.target_modules)


def supports_training(train: Any, config: Config) -> str | None:
    """Why these training settings leave no step to take triplets away in, or None."""
    first, last = phases(config, train.max_steps)
    if not train.max_steps or first < last:
        return None
    return (
        f"AdaLoRA's tinit {config.tinit} and tfinal {config.tfinal} leave none of "
        f"{train.max_steps} steps to prune in: their sum has to be less"
    )


def phases(config: Config, max_steps: int) -> tuple[int, int]:
    """How many steps are taken before the budget begins to fall, and when it has fallen."""
    first, final = (
        round(t * max_steps) if 0 < t < 1 else int(t) for t in (config.tinit, config.tfinal)
    )
    return first, max_steps - final


def budget(config: Config, layers: int, steps: int, max_steps: int) -> int:
    """How many triplets remain in all layers after `steps` steps (section 3.3): a cubic from init_r
    to target_r a layer, rounded down.

    Counted from `tinit`, as both codes do: the paper's equation 12 subtracts `tfinal` as well, and
    would neither begin at the initial budget nor end at the target.
    """
    first, last = phases(config, max_steps)
    start, end = config.init_r * layers, config.target_r * layers
    if steps < first:
        return start
    if steps >= last:
        return end
    return end + int((start - end) * (1 - (steps - first) / (last - first)) ** 3)


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: init_r (in + out + 1) for each adapted layer;
    pruned ones are still trained.
    """
    from finrepro.sizes.shapes import counted

    return counted(model, config.target_modules, lambda i, o: config.init_r * (i + o + 1))


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The model with P, Lambda and Q beside each target and everything else frozen.

    P and Q are drawn from N(0, 0.02^2) under a private generator state. Raises `ValueError` when a
    target names no layer.
    """
    import peft
    import torch

    from finrepro.methods.layers.linear import is_conv1d, linear_layers
    from finrepro.methods.layers.triplets import Allocation
    from finrepro.sizes.shapes import targeted_or_fail

    layers = targeted_or_fail(linear_layers(model), config.target_modules)
    adapted = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=config.init_r,
        target_r=config.target_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        deltaT=config.deltaT,
        beta1=config.beta1,
        beta2=config.beta2,
        orth_reg_weight=config.orth_reg_weight,
        total_step=1,  # PEFT demands a number; `before_step` sets it
        bias="none",
        target_modules=list(layers),
        fan_in_fan_out=any(is_conv1d(layer) for layer in layers.values()),
    )
    with torch.random.fork_rng(devices=[]), recognisable_quantized_layers(model):
        torch.manual_seed(seed)
        built: Any = peft.get_peft_model(model, adapted)
    built.allocation = Allocation()
    return built


@contextmanager
def recognisable_quantized_layers(model: Any) -> "Iterator[None]":
    """Inside, PEFT recognises layers of bitsandbytes' classes, as it does after Transformers' own
    loading.

    Otherwise its layer adds the update to their output in place, through which bitsandbytes
    computes no gradient.
    """
    flags = [
        name for name in ("is_loaded_in_8bit", "is_loaded_in_4bit") if not hasattr(model, name)
    ]
    for name in flags:
        setattr(model, name, True)
    try:
        yield
    finally:
        for name in flags:
            delattr(model, name)


def layers_of(model: Any) -> dict[str, dict[str, str]]:
    """Layer -> the names of its P, E and Q in the model."""
    names = [name for name, module in model.named_modules() if hasattr(module, "ranknum")]
    return {
        name: {key: f"{name}.{factor}.default" for key, factor in FACTORS.items()} for name in names
    }


def extra_loss(model: "nn.Module", config: Config) -> "Tensor":
    """The regulariser of section 3.1: orth_reg_weight times the mean distance of P and Q from
    orthogonal, over the layers' matrices.
    """
    from finrepro.methods.layers.triplets import mean_distance

    pairs = (
        (model.get_parameter(layer["P"]), model.get_parameter(layer["Q"]))
        for layer in layers_of(model).values()
    )
    return config.orth_reg_weight * mean_distance(pairs)


def before_step(view: "OptimizerView", config: Config, step: int, max_steps: int) -> None:
    """Measure the importance of every trained element, from its value and gradient before the
    step, until the budget has fallen.

    Raises `ValueError` where no step is left to prune in, `RuntimeError` when the step before was
    not allocated.
    """
    model: Any = view.model
    first, last = phases(config, max_steps)
    if first >= last:
        raise ValueError(
            f"tinit {first} and tfinal {max_steps - last} leave none of {max_steps} steps "
            "to prune in"
        )
    if not model.allocation.measured == model.allocation.allocated == step:
        raise RuntimeError(
            f"AdaLoRA is at step {step}, and has allocated after {model.allocation.allocated} steps"
        )
    model.allocation.measured += 1
    schedule = model.peft_config["default"]  # exported with the weights
    schedule.tinit, schedule.tfinal, schedule.total_step = first, max_steps - last, max_steps
    if step < last:
        for name, parameter in view.trained.items():
            value, gradient = view.value(parameter), view.gradient(parameter)
            model.allocation.measure(name, value, gradient, config.beta1, config.beta2)


def after_step(view: "OptimizerView", config: Config, step: int, max_steps: int) -> None:
    """Every `deltaT` steps, and a last time when the budget has fallen, allocate: the triplets of
    highest score survive, the Lambda of the others is set to zero.

    Between two allocations a pruned Lambda is free to grow again; after the last one it is not.
    Raises `RuntimeError` when the step was not measured.
    """
    model: Any = view.model
    steps, (first, last) = step + 1, phases(config, max_steps)
    if not model.allocation.measured == model.allocation.allocated + 1 == steps:
        raise RuntimeError(
            f"AdaLoRA is after step {step}, and has measured {model.allocation.measured} steps"
        )
    model.allocation.allocated += 1
    layers = layers_of(model)
    if steps == last or (first < steps < last and steps % config.deltaT == 0):
        model.allocation.allocate(layers, budget(config, len(layers), steps, max_steps))
    elif steps < last:
        return
    if steps == last:
        model.allocation.averages.clear()
    for name, mask in model.allocation.masks.items():
        if not mask.all():
            parameter = view.trained[layers[name]["E"]]
            value = view.value(parameter)
            view.set(parameter, value * mask.to(value)[:, None])


def state(model: Any) -> dict[str, Any]:
    """The moving averages, the last allocation and the counts of steps."""
    return dict(model.allocation.state())


def load_state(model: Any, state: dict[str, Any]) -> None:
    """Restore what `state` returned."""
    model.allocation.load(
        state, {name: parameter.device for name, parameter in model.named_parameters()}
    )
