"""Attention of one or a few new tokens a sequence over a paged cache of keys and values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlm.ops._library import define_op
from fastlm.ops._registry import Op

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)
MAX_QUERY_LEN = 8  # more new tokens than this are a prefill, which `attention` does better


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_shared_tokens: Tensor | None = None,
) -> Tensor:
    """out = softmax(cap(q · kᵀ · scale)) · v, k and v being the tokens of each sequence's own blocks.

    Token t of sequence b lies in `cache[block_table[b, t // block_size], t % block_size]`. The queries are the last
    query_len tokens of the sequence's context_lens[b] tokens, already in the cache. A query at position p sees tokens
    t ≤ p and, with `window`, t > p - window. One that sees none, as where context_lens is 0, gives zero. Slots that no
    query sees are not read. A sequence gives the same bits whatever other sequences are in the batch.

    Args:
        q: `(batch, query_len, heads, head_dim)`, query_len from 1 to 8, fp32, bf16 or fp16.
        k_cache, v_cache: `(blocks, block_size, kv_heads, head_dim)`, fp32, bf16, fp16, int8 or fp8 (float8_e4m3fn),
            both alike; heads a multiple of kv_heads: query head h reads KV head h // (heads / kv_heads).
        block_table: `(batch, max_blocks)` int32. Entries behind the last used block are not read.
        context_lens: `(batch,)` int32.
        scale: of q · kᵀ; 1 / sqrt(head_dim) by default.
        window: tokens that each query sees, itself included.
        softcap: logits become softcap · tanh(logits / softcap).
        sinks: `(heads,)`, a logit a head that joins the softmax's denominator and brings no value.
        k_scale, v_scale: fp32, broadcasting to `(blocks, block_size, kv_heads)`, of int8 and fp8 caches, which need
            them: keys are k_cache · k_scale, values v_cache · v_scale. One for a token and head, or `(kv_heads,)`.
        num_shared_tokens: `()` int32, a promise: the first so many tokens lie in the same blocks in all sequences that
            have any tokens, as a prefix cache leaves them, and all of these have as many or more. A backend may then
            read them once for several sequences. It changes no bit of the result. A tensor, so that a recorded CUDA
            graph serves other prefixes too.

    Returns:
        `(batch, query_len, heads, head_dim)` in q's dtype. Sums are fp32. No gradient.

    Raises:
        ValueError: when shapes, dtypes or options do not fit; on the CPU also when a length exceeds its row of the
            table, a block that is needed lies outside the cache, or the promise of `num_shared_tokens` is not kept. A
            GPU does not wait to look: there the queries that would see such tokens give NaN, the first sequence's
            blocks may be taken for those of the others, and nothing outside the cache is read.

    Paged as in Kwon et al., "PagedAttention", 2023 (arXiv 2309.06180), section 4.
    """
    _check(q, k_cache, v_cache, block_table, context_lens, window, softcap)
    _check_extras(q, k_cache, sinks, k_scale, v_scale)
    if num_shared_tokens is not None:
        _check_shared(k_cache.shape[1], block_table, context_lens, num_shared_tokens)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if k_scale is not None and v_scale is not None:
        k_scale, v_scale = (t.expand(k_cache.shape[:3]) for t in (k_scale, v_scale))
    return _decode_attention(
        q, k_cache, v_cache, block_table, context_lens, scale, window, softcap, sinks, k_scale, v_scale,
        num_shared_tokens,
    )  # fmt: skip


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    window: int | None,
    softcap: float | None,
) -> None:
    if q.ndim != 4 or not 1 <= q.shape[1] <= MAX_QUERY_LEN:
        raise ValueError(
            f"q must be (batch, query_len, heads, head_dim), query_len 1 to {MAX_QUERY_LEN}, not {tuple(q.shape)}"
        )
    if k_cache.ndim != 4 or k_cache.shape != v_cache.shape or k_cache.shape[3] != q.shape[3] or k_cache.shape[1] == 0:
        raise ValueError(
            f"k_cache and v_cache must be (blocks, block_size, kv_heads, {q.shape[3]}), "
            f"not {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if k_cache.shape[2] == 0 or q.shape[2] % k_cache.shape[2]:
        raise ValueError(f"heads ({q.shape[2]}) must be a multiple of kv_heads ({k_cache.shape[2]})")
    if q.dtype not in FLOATING or k_cache.dtype not in (*FLOATING, *QUANTIZED) or k_cache.dtype != v_cache.dtype:
        raise ValueError(
            f"q must be fp32, bf16 or fp16, and the caches alike one of these, int8 or float8_e4m3fn, "
            f"not {q.dtype}, {k_cache.dtype} and {v_cache.dtype}"
        )
    if block_table.ndim != 2 or block_table.shape[0] != q.shape[0] or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table must be ({q.shape[0]}, max_blocks) int32, not {tuple(block_table.shape)} {block_table.dtype}"
        )
    if context_lens.shape != q.shape[:1] or context_lens.dtype != torch.int32:
        raise ValueError(
            f"context_lens must be ({q.shape[0]},) int32, not {tuple(context_lens.shape)} {context_lens.dtype}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be 1 or more, not {window}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be above 0, not {softcap}")


def _check_extras(
    q: Tensor, k_cache: Tensor, sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    heads = q.shape[2]
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise ValueError(f"sinks must be ({heads},), one for each query head, not {tuple(sinks.shape)} {sinks.dtype}")
    quantized = k_cache.dtype in QUANTIZED
    for name, t in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (t is not None) != quantized:
            raise ValueError(
                f"{name} must be given for int8 and fp8 caches and for no others; these are {k_cache.dtype}"
            )
        if t is None:
            continue
        full = k_cache.shape[:3]
        fits = t.dim() <= 3 and all(a in (1, b) for a, b in zip(reversed(t.shape), reversed(full), strict=False))
        if not fits or t.dtype != torch.float32:
            raise ValueError(
                f"{name} must be fp32 and broadcast to (blocks, block_size, kv_heads) = {tuple(full)}, "
                f"not {tuple(t.shape)} {t.dtype}"
            )


def _check_shared(block_size: int, block_table: Tensor, context_lens: Tensor, num_shared_tokens: Tensor) -> None:
    if num_shared_tokens.dim() or num_shared_tokens.dtype != torch.int32:
        raise ValueError(
            f"num_shared_tokens must be () int32, not {tuple(num_shared_tokens.shape)} {num_shared_tokens.dtype}"
        )
    if num_shared_tokens.device.type != "cpu":
        return
    shared, rows = int(num_shared_tokens), context_lens > 0
    if shared <= 0 or not rows.any():
        return
    if (shortest := int(context_lens[rows].min())) < shared:
        raise ValueError(f"num_shared_tokens is {shared}, but a sequence has only {shortest} tokens")
    tables = block_table[rows, : -(-shared // block_size)]
    if not (tables == tables[0]).all():
        raise ValueError(f"num_shared_tokens is {shared}, but the first {tables.shape[1]} blocks differ")


# The CUDA core takes one launch where Triton takes two, so it should be quicker where there is little to read. That has
# been measured on no GPU: it comes after Triton, which serves all that it does, and runs when FASTLM_BACKEND=cuda asks.
OP = Op("decode_attention", decode_attention, ("triton", "cuda", "cpu", "reference"))


def _run(
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
    backend = OP.select(
        q, k_cache, v_cache, block_table, context_lens, scale=scale, window=window, softcap=softcap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, num_shared_tokens=num_shared_tokens,
    )  # fmt: skip
    return backend.decode_attention(
        q, k_cache, v_cache, block_table, context_lens, scale, window, softcap, sinks, k_scale, v_scale,
        num_shared_tokens,
    )  # fmt: skip


def _fake(
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
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


class _DecodeAttention(torch.autograd.Function):
    """Says that there is no gradient, where torch would go on without one."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return _decode_attention(*args)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        raise RuntimeError(
            "decode_attention has no gradient; to train, use attention on the keys and values themselves"
        )


_decode_attention = define_op(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor context_lens, float scale, "
    "int? window, float? softcap, Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None, "
    "Tensor? num_shared_tokens=None) -> Tensor",
    _run,
    _fake,
    _DecodeAttention,
)
