"""On the CPU: `csrc/cpu/decode_attention.cpp` reads each key and value once for all query heads that share it.

Flash-decoding: splits of 256 tokens, an online softmax within each, combined in order. Reading the cache limits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._core import native, native_missing

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def supports(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    num_shared_tokens: Tensor | None = None,
) -> str | None:
    if q.dtype not in DTYPES:
        return f"supports fp32, bf16 and fp16, not {q.dtype}"
    if k_cache.dtype not in DTYPES:
        return f"supports caches of fp32, bf16 and fp16, not {k_cache.dtype}"
    if sinks is not None:
        return "has no sinks"
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return "needs caches whose last dimension is contiguous"
    return native_missing()


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: None,
    k_scale: None,
    v_scale: None,
    num_shared_tokens: Tensor | None = None,
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    if q.stride(3) != 1:
        q = q.contiguous()
    block_table, context_lens = block_table.contiguous(), context_lens.contiguous()
    getattr(native(), f"decode_attention_{DTYPES[k_cache.dtype]}")(
        DTYPES[q.dtype],
        q.data_ptr(),
        q.shape,
        q.stride()[:3],
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k_cache.shape[:3],
        k_cache.stride()[:3],
        v_cache.stride()[:3],
        block_table.data_ptr(),
        block_table.shape[1],
        context_lens.data_ptr(),
        scale,
        window or 0,
        softcap or 0.0,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
