"""`torch.nn.functional.scaled_dot_product_attention`, argument for argument, on fastlm's attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.errors import ConfigError
from fastlm.ops import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query · keyᵀ · scale + attn_mask) · value, with torch's shapes and torch's causal alignment.

    Args:
        query: `(batch, heads, seq_q, head_dim)`.
        key, value: `(batch, kv_heads, seq_k, head_dim)`; kv_heads divides heads when `enable_gqa`, else equals it.
        attn_mask: broadcasts to `(batch, heads, seq_q, seq_k)`; bool (True: visible) or floating (added to the logits).
        dropout_p: share of the softmax's weights set to zero, in [0, 1). On the CPU it is served by plain PyTorch.
        is_causal: query i sees keys 0 … i: aligned at the top left, also where seq_q and seq_k differ.
        scale: 1 / sqrt(head_dim) by default.
        enable_gqa: each key and value head serves heads / kv_heads query heads in a row.

    Returns:
        `(batch, heads, seq_q, head_dim)`. A query that sees no key gives zero.

    Raises:
        ConfigError: with `is_causal` beside `attn_mask`, or with grouped heads but not `enable_gqa`.
        ValueError: when shapes or dtypes do not fit.
    """
    if is_causal and attn_mask is not None:
        raise ConfigError("is_causal and attn_mask exclude each other; put the causal part into attn_mask")
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(
            "query, key and value must be (batch, heads, seq, head_dim), "
            f"not {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ConfigError(f"{query.shape[1]} query heads over {key.shape[1]} key heads need enable_gqa=True")
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if is_causal and q.shape[1] != k.shape[1]:
        return _causal_from_the_top_left(q, k, v, scale, dropout_p).transpose(1, 2)
    return _attend(q, k, v, is_causal, scale, dropout_p, bias).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, dropout: float, bias: Tensor | None = None
) -> Tensor:
    out = attention(q, k, v, causal=causal, scale=scale, bias=bias, dropout=dropout)
    assert isinstance(out, Tensor)
    return out


def _causal_from_the_top_left(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float) -> Tensor:
    """The leading square is causal either way; keys beyond it are unseen, and queries beyond it see all keys."""
    square = min(q.shape[1], k.shape[1])
    out = _attend(q[:, :square], k[:, :square], v[:, :square], True, scale, dropout)
    if square == q.shape[1]:
        return out
    return torch.cat([out, _attend(q[:, square:], k, v, False, scale, dropout)], dim=1)
