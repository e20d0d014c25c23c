"""Why a combination of model, quantizer, adapter and training cannot run anywhere, each in one
line, before anything is loaded.
"""

from finrepro.catalogue.spec import Model, RunSpec
from finrepro.kinds import adapter_of, optimizer_of, quantizer_of
from finrepro.settings import Choice


def unstorable(stored_model: Model, quantizer: Choice, zero_stage: int) -> str | None:
    """Why a quantizer cannot hold a model at a ZeRO stage, None if it can."""
    return quantizer_of(quantizer).supports(stored_model, quantizer, zero_stage)


def refusal(spec: RunSpec) -> str | None:
    """Why the combination cannot run anywhere, None if it can."""
    stage = spec.train.zero_stage
    if spec.weights == "scratch" and spec.model.low_rank and spec.model.low_rank.of:
        return f"starts from the trained weights of {spec.model.low_rank.of}, not from scratch"
    if not spec.train.max_steps and len(spec.train_on.parts) > 1:
        return "an untrained model is scored on each task of a mix by itself"
    reason = unstorable(spec.model, spec.quantizer, stage)
    method = adapter_of(spec.adapter)
    reason = reason or method.supports(spec.model, spec.quantizer, stage)
    reason = reason or method.supports_training(spec.train)
    if spec.train.max_steps:
        reason = reason or optimizer_of(spec.train.optimizer).supports(spec)
    return reason or not_compilable(spec)


def not_compilable(spec: RunSpec) -> str | None:
    """Why a cell that asks for it cannot be compiled, None if it can."""
    if not (spec.train.compile and spec.train.max_steps):
        return None
    if spec.train.zero_stage == 3:
        return (
            "torch.compile does not go with ZeRO stage 3, whose hooks gather and drop each layer's "
            "weights: take stage 0, 1 or 2"
        )
    return quantizer_of(spec.quantizer).not_compiled() or adapter_of(spec.adapter).not_compiled()
