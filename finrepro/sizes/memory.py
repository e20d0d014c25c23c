"""Bytes of a model from its sizes: exact as it is stored, estimated as it is trained. No torch."""

from dataclasses import dataclass
from typing import Any

from finrepro.kinds import quantizer_of
from finrepro.settings import Choice
from finrepro.sizes.flops import width
from finrepro.sizes.shapes import block_sizes, counted, depth, linear_parameters

# Bytes of activations a token and block without checkpointing, in 16 bits with fused attention: a
# unit of the hidden width, and of a gated MLP's inner width (Korthikanti et al., 2022, arXiv
# 2205.05198, without its attention term, for GPT; the same count of a Llama block's tensors).
ACTIVATIONS = {"gpt2": (34, 0), "llama": (15, 8)}
LOGITS = 10  # bytes a logit: 16 bits, their fp32 copy and its gradient


@dataclass(frozen=True)
class Training:
    """Bytes on one device while training, by their use."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them: without the allocator's fragments, the driver's context and
        communication.
        """
        return self.weights + self.gradients + self.optimizer + self.activations


def stored_bytes(model: Any, quantizer: Choice) -> int:
    """Bytes of the base as it is stored, quantization constants included: exact, from the
    architecture.

    Embeddings, norms and the output head keep the model's dtype.
    """
    bits = 16 if model.dtype == "bfloat16" else 32
    layer_bytes = quantizer_of(quantizer).layer_bytes
    sizes = block_sizes(model).values()
    blocks = depth(model) * sum(layer_bytes(inputs, outputs, bits) for inputs, outputs in sizes)
    return int(blocks + (model.parameters - linear_parameters(model)) * bits // 8)


def cache_bytes(model: Any) -> int:
    """Bytes of the key-value cache a token, in 16 bits."""
    shape = model.architecture
    heads = (
        1 if model.family == "gpt2" else shape["num_key_value_heads"] / shape["num_attention_heads"]
    )
    return int(2 * 2 * depth(model) * width(model) * heads)


def activation_bytes(model: Any, tokens: int, checkpointing: bool) -> int:
    """Estimated bytes of the activations of `tokens` that the backward pass needs, logits included;
    with `checkpointing` each block's input, and one block's activations.
    """
    hidden, inner = ACTIVATIONS[model.family]
    block = hidden * width(model) + inner * model.architecture.get("intermediate_size", 0)
    blocks = 2 * width(model) * depth(model) + block if checkpointing else block * depth(model)
    return tokens * (blocks + LOGITS * model.architecture["vocab_size"])


def full_bytes(model: Any, tokens: int, checkpointing: bool = True) -> Training:
    """Every parameter trained by AdamW in mixed precision: 16 bits of weight and gradient, 32 of
    master copy and of two moments.
    """
    n = model.parameters
    return Training(2 * n, 2 * n, 12 * n, activation_bytes(model, tokens, checkpointing))


def lora_bytes(
    model: Any, quantizer: Choice, rank: int, tokens: int, checkpointing: bool = True
) -> Training:
    """A LoRA on all linear layers, in fp32 with AdamW, beside the stored base."""
    trained = counted(model, "all-linear", lambda i, o: rank * (i + o))
    base = stored_bytes(model, quantizer)
    return Training(
        base + 4 * trained, 4 * trained, 8 * trained, activation_bytes(model, tokens, checkpointing)
    )
