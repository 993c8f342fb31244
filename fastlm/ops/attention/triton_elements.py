"""What the Triton kernels add to single logits, and which weights they drop."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_bias(
    bias_ptr, row_stride, key_stride, first_query, first_key, seq_q, seq_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) of one head's bias, fp32; or (BLOCK_N, BLOCK_M). Within a tile 31 bits reach."""
    bias_ptr += tl.cast(first_query, tl.int64) * row_stride + tl.cast(first_key, tl.int64) * key_stride
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    is_query, is_key = rows < seq_q - first_query, columns < seq_k - first_key
    if TRANSPOSED:
        ptrs = bias_ptr + (columns[:, None] * key_stride + rows[None, :] * row_stride)
        mask = is_key[:, None] & is_query[None, :]
    else:
        ptrs = bias_ptr + (rows[:, None] * row_stride + columns[None, :] * key_stride)
        mask = is_query[:, None] & is_key[None, :]
    return tl.load(ptrs, mask, 0.0).to(tl.float32)


@triton.jit
def is_kept(seed_ptr, threshold, plane, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) of bool, see `reference.kept`. One call of Philox makes the words of four keys."""
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.uint32)
    quads = zero + (first_key // 4 + tl.arange(0, BLOCK_N // 4))[None, :].to(tl.uint32)
    rows = zero + (first_query + tl.arange(0, BLOCK_M))[:, None].to(tl.uint32)
    seed = tl.load(seed_ptr).to(tl.uint64)
    word0, word1, word2, word3 = tl.philox(seed, quads, rows, zero + plane.to(tl.uint32), zero)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # of a quad: 0, 1, 2, 3
    return (tl.reshape(words, (BLOCK_M, BLOCK_N)) >> 1).to(tl.int32) >= threshold
