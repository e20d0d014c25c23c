"""How much memory a cell needs."""

from finrepro.catalogue.footprint import base_bytes
from finrepro.catalogue.spec import RunSpec
from finrepro.kinds import adapter_of
from finrepro.sizes.shapes import depth


def needed_bytes(spec: RunSpec) -> int:
    """Memory of one device to train the cell: base as stored, trained parameters in fp32 with
    gradient and two moments, and activations of a checkpointed forward pass (QLoRA's and ZeRO's
    formulas: 4 + 4 + 8 bytes a trained parameter; stage 1 divides the moments by the number of
    devices, 2 also the gradients, 3 everything but the activations). An estimate for refusing what
    cannot fit, not a prediction.
    """
    shape, dtype_bits = spec.model.architecture, 16 if spec.model.dtype == "bfloat16" else 32
    base = base_bytes(spec)
    trained = adapter_of(spec.adapter).trainable_parameters(spec.model)
    width = shape["n_embd" if spec.model.family == "gpt2" else "hidden_size"]
    kept = 1 if spec.train.activation_checkpointing else 16
    tokens = spec.train.max_tokens if spec.train.max_steps else spec.evaluation.max_tokens
    activations = tokens * width * (depth(spec.model) * kept + 20) * dtype_bits / 8
    stage, ranks = spec.train.zero_stage, spec.world_size
    weights = 4 * trained / (ranks if stage == 3 else 1)
    gradients = 4 * trained / (ranks if stage >= 2 else 1)
    moments = 8 * trained / (ranks if stage >= 1 else 1)
    return int(base / (ranks if stage == 3 else 1) + weights + gradients + moments + activations)
