"""The definition, in plain torch: each sequence's keys are gathered from its blocks and every logit is materialised."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: object, **options: object) -> str | None:
    return None


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_shared_tokens: Tensor | None = None,
) -> Tensor:
    """Computes in fp32, or in fp64 for fp64 input."""
    wide = torch.promote_types(q.dtype, torch.float32)
    _, query_len, heads, _ = q.shape
    blocks, block_size, kv_heads, _ = k_cache.shape
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for row, length in enumerate(context_lens.tolist()):
        most = block_table.shape[1] * block_size
        if not 0 <= length <= most:
            raise ValueError(f"context_lens[{row}] is {length}, but a row of block_table holds 0 to {most} tokens")
        first = 0 if window is None else max(0, length - query_len - window + 1)  # the first token that a query sees
        first_block = first // block_size
        ids = block_table[row, first_block : -(-length // block_size)].long()
        if not ((ids >= 0) & (ids < blocks)).all():
            raise ValueError(f"block_table[{row}] names a block outside the cache of {blocks}: {ids.tolist()}")
        seen = slice(first - first_block * block_size, length - first_block * block_size)
        k, v = (
            _tokens(cache, its_scale, ids, wide)[seen].repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1)
            for cache, its_scale in ((k_cache, k_scale), (v_cache, v_scale))
        )
        logits = (q[row].to(wide).transpose(0, 1) @ k.mT) * scale  # (heads, query_len, length - first)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        position = torch.arange(length - query_len, length, device=q.device)[:, None]
        key = torch.arange(first, length, device=q.device)
        visible = key <= position
        if window is not None:
            visible &= key > position - window
        logits = logits.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            sink = sinks.to(wide)[:, None, None].expand(heads, query_len, 1)
            weights = torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
        else:
            weights = torch.softmax(logits, -1)
        out[row] = (weights.masked_fill(~visible, 0.0) @ v).transpose(0, 1).to(q.dtype)
    return out


def _tokens(cache: Tensor, scale: Tensor | None, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values of some blocks, `(tokens, kv_heads, head_dim)`."""
    tokens = cache[ids].flatten(0, 1).to(dtype)
    return tokens if scale is None else tokens * scale[ids].flatten(0, 1).to(dtype)[..., None]
