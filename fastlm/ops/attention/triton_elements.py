"""What the Triton kernels add to single logits, and which weights they drop."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_bias(bias_ptr, row_stride, key_stride, queries, keys, seq_q, seq_k, TRANSPOSED: tl.constexpr):
    """(queries, keys) of the bias at `bias_ptr`, one head's, fp32; or (keys, queries)."""
    rows, columns = queries.to(tl.int64) * row_stride, keys.to(tl.int64) * key_stride
    if TRANSPOSED:
        ptrs = bias_ptr + columns[:, None] + rows[None, :]
        mask = (keys < seq_k)[:, None] & (queries < seq_q)[None, :]
    else:
        ptrs = bias_ptr + rows[:, None] + columns[None, :]
        mask = (queries < seq_q)[:, None] & (keys < seq_k)[None, :]
    return tl.load(ptrs, mask, 0.0).to(tl.float32)


@triton.jit
def is_kept(seed_ptr, threshold, plane, queries, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) of bool, see `reference.kept`. One call of Philox makes the words of four keys."""
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.uint32)
    quads = zero + (first_key // 4 + tl.arange(0, BLOCK_N // 4))[None, :].to(tl.uint32)
    rows = zero + queries[:, None].to(tl.uint32)
    seed = tl.load(seed_ptr).to(tl.uint64)
    word0, word1, word2, word3 = tl.philox(seed, quads, rows, zero + plane.to(tl.uint32), zero)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # of a quad: 0, 1, 2, 3
    return (tl.reshape(words, (BLOCK_M, BLOCK_N)) >> 1).to(tl.int32) >= threshold
