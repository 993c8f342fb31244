"""Rotary embedding in Triton. One program rotates every query and key head of one token: the angles' cosines and sines
are read once a token, q and k are read once and written once, in a single launch. The backward is the same kernel with
the sign of the sine turned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROTARY_DIM = 512
MAX_TILE = 2048  # pairs that a program holds at once: 16 for each of 128 threads


def supports(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, positions: Tensor | None
) -> str | None:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"supports fp32, bf16 and fp16, not {q.dtype}"
    if cos.dtype != torch.float32:
        return f"supports fp32 tables, not {cos.dtype}"
    if 2 * cos.shape[1] > MAX_ROTARY_DIM:
        return f"supports up to {MAX_ROTARY_DIM} rotated dimensions, not {2 * cos.shape[1]}"
    return None


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, x_stride, heads, head_dim, half, cos, sin,
    INTERLEAVED: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    for first in range(0, heads, BLOCK_HEADS):
        head = first + tl.arange(0, BLOCK_HEADS)[:, None]
        x_head, y_head = x_ptr + head.to(tl.int64) * x_stride, y_ptr + head * head_dim
        if INTERLEAVED:
            both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
            mask = (head < heads) & (both < 2 * half)
            x = tl.load(x_head + both, mask, 0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_HALF, 2)))
            rotated = tl.join(a * cos - b * sin, b * cos + a * sin)
            tl.store(y_head + both, tl.reshape(rotated, (BLOCK_HEADS, 2 * BLOCK_HALF)), mask)
        else:
            mask = (head < heads) & (pairs < half)
            a = tl.load(x_head + pairs, mask, 0.0).to(tl.float32)
            b = tl.load(x_head + half + pairs, mask, 0.0).to(tl.float32)
            tl.store(y_head + pairs, a * cos - b * sin, mask)
            tl.store(y_head + half + pairs, b * cos + a * sin, mask)
        if BLOCK_REST > 0:
            rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
            mask = (head < heads) & (rest < head_dim)
            tl.store(y_head + rest, tl.load(x_head + rest, mask, 0.0), mask)


@triton.jit
def _kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, rotated_q_ptr, rotated_k_ptr,
    q_batch_stride, q_seq_stride, q_head_stride, k_batch_stride, k_seq_stride, k_head_stride,
    positions_batch_stride, positions_seq_stride, seq, q_heads, k_heads, head_dim, half, max_positions, sign,
    HAS_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_Q_HEADS: tl.constexpr, BLOCK_K_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, at = token // seq, token % seq
    position = at
    if HAS_POSITIONS:
        offset = batch * positions_batch_stride + at * positions_seq_stride
        position = tl.load(positions_ptr + offset).to(tl.int64)
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    rows = position + tl.zeros((1, BLOCK_HALF), tl.int64)
    mask = (pairs < half) & (rows >= 0) & (rows < max_positions)
    cos = tl.load(cos_ptr + rows * half + pairs, mask, float("nan"))
    sin = tl.load(sin_ptr + rows * half + pairs, mask, float("nan")) * sign
    _rotate_heads(
        q_ptr + batch * q_batch_stride + at * q_seq_stride, rotated_q_ptr + token * q_heads * head_dim,
        q_head_stride, q_heads, head_dim, half, cos, sin, INTERLEAVED, BLOCK_Q_HEADS, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _rotate_heads(
        k_ptr + batch * k_batch_stride + at * k_seq_stride, rotated_k_ptr + token * k_heads * head_dim,
        k_head_stride, k_heads, head_dim, half, cos, sin, INTERLEAVED, BLOCK_K_HEADS, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


def _block_heads(heads: int, block_half: int) -> int:
    return max(1, min(triton.next_power_of_2(heads), MAX_TILE // block_half))


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    rotated_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rotated_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q.dim() == 3:
        q, k = q[None], k[None]
    batch, seq, _, head_dim = q.shape
    half = cos.shape[1]
    if batch * seq == 0 or head_dim == 0:
        return rotated_q, rotated_k
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    strides = (0, 0)
    if positions is not None:
        strides = (positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1))
    block_half = triton.next_power_of_2(max(half, 1))
    rest = head_dim - 2 * half
    _kernel[(batch * seq,)](
        q, k, cos.contiguous(), sin.contiguous(), cos if positions is None else positions, rotated_q, rotated_k,
        *q.stride()[:3], *k.stride()[:3], *strides, seq, q.shape[2], k.shape[2], head_dim, half, cos.shape[0],
        -1.0 if inverse else 1.0,
        HAS_POSITIONS=positions is not None, INTERLEAVED=interleaved,
        BLOCK_Q_HEADS=_block_heads(q.shape[2], block_half), BLOCK_K_HEADS=_block_heads(k.shape[2], block_half),
        BLOCK_HALF=block_half, BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
    )  # fmt: skip
    return rotated_q, rotated_k
