"""On the CUDA core: `csrc/cuda/decode_attention.cu`, which splits and combines in one launch where Triton's takes two.

What the blocks of a sequence count down with stays zero between calls, so it is kept, one a stream: calls on one
stream follow one another. A graph that is being captured gets its own, which it clears at its start whenever it is
replayed, since it may run beside calls on the stream it was captured on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._core import cuda
from fastlm.ops._cuda import not_built_for
from fastlm.ops.decode_attention import MAX_QUERY_LEN

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MIN_SPLIT = 128  # these three as in csrc/cuda/decode_attention.hpp
MAX_SPLITS = 64
MIN_ROWS = 16
MIN_COUNTERS = 4096  # so that they are seldom made anew

_counters: dict[tuple[int, int], tuple[int, Tensor]] = {}  # (device, stream): of which capture, and they


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
    if k_cache.dtype != q.dtype:
        return f"reads caches of q's dtype alone, {q.dtype}, not {k_cache.dtype}"
    if q.shape[3] % 8 or not 16 <= q.shape[3] <= 256:
        return f"supports head_dim 16 to 256 in steps of 8, not {q.shape[3]}"
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return "needs caches whose last dimension is contiguous"
    step = 16 // q.element_size()
    for cache in (k_cache, v_cache):
        if cache.data_ptr() % 16 or any(stride % step for stride in cache.stride()[:3]):
            return "needs caches that start, and whose tokens lie, at multiples of 16 bytes"
    if block_table.shape[1] * k_cache.shape[1] > 2**30:
        return "supports rows of block_table up to 2^30 tokens"
    return not_built_for(q.device) if q.is_cuda else None


def _zeros(count: int, device: torch.device, stream: int) -> Tensor:
    capture = cuda().capture_id(stream)
    key = (device.index or 0, stream)
    kept = _counters.get(key)
    if kept is None or kept[0] != capture or kept[1].numel() < count:
        kept = (capture, torch.zeros(max(count, MIN_COUNTERS), dtype=torch.int32, device=device))
        _counters[key] = kept
    return kept[1]


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    k_scale: None,
    v_scale: None,
    num_shared_tokens: Tensor | None = None,
) -> Tensor:
    device, shape = q.device, q.shape
    out = torch.empty(shape, dtype=q.dtype, device=device)
    if out.numel() == 0:
        return out
    batch, query_len, heads, head_dim = shape
    _, block_size, kv_heads, _ = k_cache.shape
    q = q if q.stride(3) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    context_lens = context_lens.contiguous()
    if sinks is not None:
        sinks = (sinks if sinks.dtype == q.dtype else sinks.float()).contiguous()
    stream = torch._C._cuda_getCurrentRawStream(device.index) if q.is_cuda else 0
    table_width = block_table.shape[1]
    most = table_width * block_size
    slots = min(-(-most // MIN_SPLIT), MAX_SPLITS + (window is not None))
    workspace = counters = None
    num_floats = num_counters = 0
    if slots > 1:
        num_floats = batch * slots * query_len * heads * (head_dim + 2)
        num_counters = batch * kv_heads * -(-query_len * heads // kv_heads // MIN_ROWS)
        workspace = torch.empty(num_floats, dtype=torch.float32, device=device)
        counters = _zeros(num_counters, device, stream)
    cuda().decode_attention(
        DTYPES[q.dtype],
        device.index or 0,
        stream,
        q.data_ptr(),
        shape,
        q.stride(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k_cache.shape,
        k_cache.stride(),
        v_cache.stride(),
        block_table.data_ptr(),
        table_width,
        block_table.stride(0),
        context_lens.data_ptr(),
        scale,
        0 if window is None else min(window, most + MAX_QUERY_LEN),
        softcap or 0.0,
        0 if sinks is None else sinks.data_ptr(),
        sinks is not None and sinks.dtype == torch.float32,
        out.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        num_floats,
        0 if counters is None else counters.data_ptr(),
        num_counters,
    )
    return out
