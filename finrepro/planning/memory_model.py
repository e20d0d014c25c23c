"""Estimated memory of a cell."""

from finrepro.catalogue.footprint import base_bytes
from finrepro.catalogue.spec import RunSpec
from finrepro.kinds import adapter_of
from finrepro.sizes.shapes import depth


def needed_bytes(spec: RunSpec) -> int:
    """Estimated bytes of one device's memory to train the cell, for refusing what cannot fit.

    The base as stored, trained parameters in fp32 with gradient and two moments (4 + 4 + 8 bytes a
    trained parameter: Dettmers et al., 2023, arXiv 2305.14314), and activations. ZeRO divides by
    the number of devices: stage 1 the moments, 2 also the gradients, 3 everything but the
    activations (Rajbhandari et al., 2020, arXiv 1910.02054).
    """
    shape, dtype_bits = spec.model.architecture, 16 if spec.model.dtype == "bfloat16" else 32
    base = base_bytes(spec)
    trained = adapter_of(spec.adapter).trainable_parameters(spec.model)
    width = shape["n_embd" if spec.model.family == "gpt2" else "hidden_size"]
    # Tensors of the hidden width that a block keeps for the backward pass.
    tensors_a_block = 1 if spec.train.activation_checkpointing else 16
    tokens = spec.train.max_tokens if spec.train.max_steps else spec.evaluation.max_tokens
    activations = tokens * width * (depth(spec.model) * tensors_a_block + 20) * dtype_bits / 8
    stage, ranks = spec.train.zero_stage, spec.world_size
    weights = 4 * trained / (ranks if stage == 3 else 1)
    gradients = 4 * trained / (ranks if stage >= 2 else 1)
    moments = 8 * trained / (ranks if stage >= 1 else 1)
    return int(base / (ranks if stage == 3 else 1) + weights + gradients + moments + activations)
