"""Why a combination of model, quantizer, adapter and training cannot run anywhere, each in one
line, before anything is loaded.
"""

from typing import TYPE_CHECKING

from finrepro.catalogue.spec import Model, RunSpec
from finrepro.settings import Choice

if TYPE_CHECKING:
    from finrepro.catalogue.spec import RunSpec


def unstorable(stored_model: Model, chosen: Choice, zero_stage: int) -> str | None:
    """Why a quantizer cannot hold a model at a ZeRO stage, None if it can."""
    supports = getattr(chosen.module("quantizers"), "supports", None)
    return supports(stored_model, chosen, zero_stage) if supports else None


def refusal(spec: RunSpec) -> str | None:
    """Why the combination cannot run anywhere, None if it can."""
    stage = spec.train.zero_stage
    if spec.weights == "scratch" and spec.model.low_rank and spec.model.low_rank.of:
        return f"starts from the trained weights of {spec.model.low_rank.of}, not from scratch"
    if not spec.train.max_steps and len(spec.train_on.parts) > 1:
        return "an untrained model is scored on each task of a mix by itself"
    reason = unstorable(spec.model, spec.quantizer, stage)
    choice, module = spec.adapter, spec.adapter.module("adapters")
    reason = reason or module.supports(spec.model, spec.quantizer, stage, choice.config)
    trainable = getattr(module, "supports_training", None)
    reason = reason or (trainable(spec.train, choice.config) if trainable else None)
    stepped = (
        getattr(spec.train.optimizer.module("optimizers"), "supports", None)
        if spec.train.max_steps
        else None
    )
    reason = reason or (stepped(spec, spec.train.optimizer.config) if stepped else None)
    return reason or not_compilable(spec)


def not_compilable(spec: "RunSpec") -> str | None:
    """Why a cell that asks for it cannot be compiled, None if it can."""
    if not (spec.train.compile and spec.train.max_steps):
        return None
    if spec.train.zero_stage == 3:
        return "torch.compile does not go with ZeRO stage 3, whose hooks gather and drop each layer's weights: take stage 0, 1 or 2"
    for package, choice in (("quantizers", spec.quantizer), ("adapters", spec.adapter)):
        says = getattr(choice.module(package), "not_compiled", None)
        if says and (reason := says(choice.config)):
            return str(reason)
    return None
