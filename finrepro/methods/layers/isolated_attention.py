"""Causal attention confined to segments of a row, so that packed examples do not see one another.

Registered with Transformers under `NAME`. Without `segment_lengths` it is plain scaled-dot-product
attention. With them, on CUDA, it is one variable-length flash-attention call
(`torch.nn.attention.varlen`); elsewhere, one call a segment: exact, and linear in the number of
segments, where a block-diagonal mask would be quadratic in the row's length. Passing the segments
explicitly avoids Transformers' guess from position ids, which a key-value cache or an attention
mask silently switches off.

In a compiled graph (finrepro.training.compilation) attention over segments is one custom operator
around the eager implementation. Its lengths are a tensor, so that a bin with other lengths is not
compiled again, and its backward recomputes the attention, since a custom operator has no
intermediate results to save.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "finrepro_isolated"
Implementation = Literal["sdpa", "sdpa per segment", "flash varlen"]


def implementation(segments: bool, device_type: str, dtype: torch.dtype) -> Implementation:
    """What computes attention, for rows that consist of `segments` or not, on this kind of device
    and in this dtype of the queries.

    `sdpa`: torch's scaled-dot-product attention over whole rows; `sdpa per segment`: one such call
    a segment; `flash varlen`: one variable-length flash-attention call over all segments, which
    exists on CUDA in 16 bits.
    """
    if not segments:
        return "sdpa"
    return (
        "flash varlen"
        if device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        else "sdpa per segment"
    )


def isolated_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads seq head_dim"],
    key: Float[Tensor, "batch kv_heads past_seq head_dim"],
    value: Float[Tensor, "batch kv_heads past_seq head_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_lengths: Tensor | tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch seq heads head_dim"], None]:
    """Transformers' attention interface; lengths as a tensor lie on the CPU. Raises `ValueError`
    for segments in a batch of more than one row, and for dropout in compiled code."""
    if segment_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if query.shape[0] != 1:
        raise ValueError("segments are laid end to end in one row; the batch has several")
    if torch.compiler.is_compiling() and isinstance(segment_lengths, Tensor):
        if dropout:
            raise ValueError("compiled attention over segments has no dropout")
        return _operator(query, key, value, segment_lengths, scaling), None
    lengths = (
        tuple(segment_lengths.tolist()) if isinstance(segment_lengths, Tensor) else segment_lengths
    )
    return _over_segments(query, key, value, lengths, scaling, dropout), None


def _over_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """(1, heads, seq, head_dim) in, (1, seq, heads, head_dim) out."""
    if implementation(True, query.device.type, query.dtype) == "flash varlen":
        return _variable_length(query, key, value, lengths, scaling)
    segments = [
        scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        for q, k, v in zip(
            query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
        )
    ]
    return torch.cat(segments, dim=2).transpose(1, 2).contiguous()


@torch.library.custom_op("finrepro::attention_over_segments", mutates_args=())
def _operator(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scaling: float | None
) -> Tensor:
    return _over_segments(query, key, value, tuple(lengths.tolist()), scaling).contiguous()


@torch.library.custom_op("finrepro::attention_over_segments_backward", mutates_args=())
def _backward_operator(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scaling: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad(), _recorded_by_autograd():
        q, k, v = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        out = _over_segments(q, k, v, tuple(lengths.tolist()), scaling)
        q, k, v = torch.autograd.grad(out, (q, k, v), gradient)
    return q.contiguous(), k.contiguous(), v.contiguous()


@contextmanager
def _recorded_by_autograd() -> Iterator[None]:
    """Inside, autograd records what an operator's implementation computes; torch calls it below
    autograd's dispatch keys.
    """
    keys = [
        getattr(torch._C.DispatchKey, name) for name in ("AutogradFunctionality", "ADInplaceOrView")
    ]
    before = [(key, torch._C._dispatch_tls_is_dispatch_key_excluded(key)) for key in keys]
    for key in keys:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        for key, excluded in before:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


@_operator.register_fake
def _shape_of_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scaling: float | None
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@_backward_operator.register_fake
def _shapes_of_gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_operator(gradient, *ctx.saved_tensors, ctx.scaling), None, None


_operator.register_autograd(_differentiate, setup_context=_remember)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float | None
) -> Tensor:
    """One flash-attention call over all segments; (1, heads, seq, head_dim) in, (1, seq, heads,
    head_dim) out.
    """
    from torch.nn.attention.varlen import varlen_attn

    bounds = (
        torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)
    )
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    longest = max(lengths)
    out = varlen_attn(
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)  # it is a pair only when auxiliary outputs are asked for
    return out.unsqueeze(0)


def register() -> None:
    """Make the implementation known to Transformers; models are then loaded with
    `attn_implementation=NAME`.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, isolated_attention)
