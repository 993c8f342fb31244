"""`flash_attn_func` and `flash_attn_varlen_func` as the flash-attn package has them, on fastlm's attention.

They run wherever `fastlm.ops.attention` does: on the CPU too, in fp32 too, and with any head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.errors import ConfigError
from fastlm.ops import attention

Output = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """softmax(q · kᵀ · softmax_scale) · v. The last query stands beside the last key.

    Args:
        q: `(batch, seq_q, heads, head_dim)`.
        k, v: `(batch, seq_k, kv_heads, head_dim)`; kv_heads divides heads.
        dropout_p: must be 0.
        window_size: (left, right), how many keys a query sees before and after its own; -1 is all of them. To the
            right it can see none or all.
        softcap: logits become softcap · tanh(logits / softcap); 0 is off.
        alibi_slopes: `(heads,)` or `(batch, heads)`; slope · distance is taken off each logit.
        deterministic: without meaning, since the backward always is.
        return_attn_probs: return (out, lse, None), lse `(batch, heads, seq_q)` fp32. The probabilities are never made.

    Raises:
        ConfigError: with dropout, or a window that ends at a finite number of keys to the right.
        ValueError: when shapes or dtypes do not fit.
    """
    causal, window = _visible(causal, window_size)
    _refuse_dropout(dropout_p)
    bias = None if alibi_slopes is None else _alibi(alibi_slopes, q.shape[1], k.shape[1], q.dtype)
    out, lse = attention(
        q,
        k,
        v,
        causal=causal,
        window=window,
        softcap=softcap or None,
        bias=bias,
        scale=softmax_scale,
        return_lse=True,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Output:
    """`flash_attn_func` over packed sequences.

    Args:
        q: `(tokens_q, heads, head_dim)`.
        k, v: `(tokens_k, kv_heads, head_dim)`.
        cu_seqlens_q, cu_seqlens_k: `(sequences + 1,)` int32: where each sequence begins, and the last ends.
        max_seqlen_q, max_seqlen_k: no sequence is longer.
        alibi_slopes, block_table: must be None.
        The others: as for `flash_attn_func`; lse is `(heads, tokens_q)`.

    Raises:
        ConfigError: with what is not supported, named above.
        ValueError: when shapes or dtypes do not fit.
    """
    causal, window = _visible(causal, window_size)
    _refuse_dropout(dropout_p)
    if alibi_slopes is not None:
        raise ConfigError("alibi_slopes are not supported for packed sequences; use flash_attn_func on padded ones")
    if block_table is not None:
        raise ConfigError("block_table is not supported here; fastlm.ops.decode_attention reads paged keys and values")
    out, lse = attention(
        q,
        k,
        v,
        causal=causal,
        window=window,
        softcap=softcap or None,
        scale=softmax_scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        return_lse=True,
    )
    return (out, lse, None) if return_attn_probs else out


def _visible(causal: bool, window_size: tuple[int, int]) -> tuple[bool, int | None]:
    """flash-attn's window as ours, which counts the query's own key and looks back alone."""
    left, right = window_size
    if not causal and (right > 0 or right < 0 <= left):
        raise ConfigError(
            f"window_size={window_size}: a window to the right is not supported; use causal=True, (left, 0) or (-1, -1)"
        )
    causal = causal or right == 0
    return causal, left + 1 if left >= 0 else None


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p > 0:
        raise ConfigError(f"dropout_p={dropout_p}: fastlm's attention has no dropout; pass 0.0 (also when training)")


def _alibi(slopes: Tensor, seq_q: int, seq_k: int, dtype: torch.dtype) -> Tensor:
    """`(1 or batch, heads, seq_q, seq_k)`. Press et al., "Train Short, Test Long", arXiv 2108.12409, section 3."""
    queries = torch.arange(seq_q, device=slopes.device) + seq_k - seq_q
    distance = (queries[:, None] - torch.arange(seq_k, device=slopes.device)).abs()
    return (-slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance).to(dtype)
