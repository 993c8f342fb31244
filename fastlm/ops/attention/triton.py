"""FlashAttention-2 in Triton: the forward pass, and the launches of both.

One program holds a tile of queries of one head in registers and walks over tiles of keys and values, keeping for each
row the running maximum, the running sum and the unnormalised output (online softmax, Milakov and Gimelshein, arXiv
1805.02867; Dao, arXiv 2307.08691). Q is read once, K and V once for each query tile (mostly from L2: the heads of a
group run side by side), and only out and one log-sum-exp a row are written, so nothing of size seq_q × seq_k exists.
The cycles go to two matrix products a tile; beside them stands one exp2 an element, whose argument is a single fused
multiply-add because scale · log2(e) is folded into it. The walk is split into tiles that every row sees whole and the
few at the causal diagonal, the window's edge and the end, which alone are masked; tiles that no row sees are skipped.
Under a causal mask the longest walks start first, so that the short ones fill the tail. The backward is in
`triton_backward.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.attention.reference import dropout_threshold
from fastlm.ops.attention.tiles import tiles
from fastlm.ops.attention.triton_elements import is_kept, load_bias

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MAX_BIAS_STRIDE = 2**23  # times 128 rows of a tile: 30 bits


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    return_lse: bool,
    dropout: float,
    seed: int | Tensor | None,
) -> str | None:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"supports fp32, bf16 and fp16, not {q.dtype}"
    if q.shape[-1] % 8 or not 16 <= q.shape[-1] <= 512:
        return f"supports head_dim 16 to 512 in steps of 8, not {q.shape[-1]}"
    if q.shape[-1] > 256 and (q.dtype == torch.float32 or 0 < capability(q.device) < 80):
        return f"needs bf16 or fp16, and compute capability 8.0, for head_dim {q.shape[-1]}: above 256"
    if scale is not None and scale <= 0:
        return f"needs a positive scale, which the running maximum relies on, not {scale}"
    if q.dtype == torch.bfloat16 and 0 < capability(q.device) < 80:
        return "needs compute capability 8.0 for bf16; use fp16"
    return None


def capability(device: torch.device) -> int:
    """80 for sm_80; 0 when the kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@triton.jit
def span(cu_seqlens_ptr, sequence, length, PACKED: tl.constexpr):
    """(first token, tokens) of a sequence. Offsets that leave the tensor are cut to it rather than followed."""
    first = sequence * 0
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), length)
        length = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence + 1), first), length) - first
    return first, length


@triton.jit
def tanh(x):
    """Exact to fp32: a polynomial where 1 - exp(-2|x|) would cancel."""
    square = x * x
    small = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    large = (1 - decay) / (1 + decay)
    return tl.where(square < 0.0625, small, tl.where(x < 0, -large, large))


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """a · b + acc in fp32. The interpreter multiplies the bits of bf16 as integers, so there they are widened first."""
    if PRECISION == "widened":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_tile(
    ptr, row_stride, rows, limit, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """(rows, BLOCK_D) at `ptr`; zero beyond `limit` rows (where MASKED) and beyond HEAD_DIM."""
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None] * row_stride + dims[None, :]
    if MASKED and HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, (rows[:, None] < limit) & (dims[None, :] < HEAD_DIM), 0.0)
    elif MASKED:
        tile = tl.load(ptrs, rows[:, None] < limit, 0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, dims[None, :] < HEAD_DIM, 0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(ptr, row_stride, rows, limit, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < limit) & (dims[None, :] < HEAD_DIM)
    tl.store(ptr + rows[:, None] * row_stride + dims[None, :], tile.to(ptr.dtype.element_ty), mask)


@triton.jit
def key_phases(
    first_row, last_row, shift, seq_k, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bounds a ≤ b ≤ c ≤ d of key tiles for a tile of queries: masked in [a, b), whole in [b, c), masked in [c, d)."""
    start = first_row * 0
    whole_start = start
    end = seq_k + start
    whole_end = seq_k // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.maximum(last_row + shift + 1, 0)
        whole_end = tl.maximum(first_row + shift + 1, 0) // BLOCK_N * BLOCK_N
    if WINDOW:
        start = tl.maximum(first_row + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        whole_start = (tl.maximum(last_row + shift - window + 1, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        whole_start = tl.minimum(whole_start, (end + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
        whole_start = tl.maximum(whole_start, start)
    return start, whole_start, tl.maximum(whole_end, whole_start), end


@triton.jit
def _attend(
    acc, highest, total, q, k_ptr, v_ptr, k_stride, v_stride, start, end, positions, seq_k, window, inner, factor,
    bias_ptr, bias_stride, bias_key_stride, seed_ptr, threshold, keep_scale, plane, first_query, seq_q,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    for tile in tl.range(start, end, BLOCK_N, num_stages=1 if MASKED else STAGES):
        offset = tl.cast(tile, tl.int64)
        k = load_tile(k_ptr + offset * k_stride, k_stride, columns, seq_k - tile, MASKED, HEAD_DIM, BLOCK_D)
        logits = matmul(q, tl.trans(k), None, PRECISION)
        if SOFTCAP:
            logits = tanh(logits * inner)
        scale = factor
        if BIAS:
            bias = load_bias(
                bias_ptr, bias_stride, bias_key_stride, first_query, tile, seq_q, seq_k, BLOCK_M, BLOCK_N, False
            )  # fmt: skip
            logits = logits * factor + bias * LOG2_E
            scale = 1.0
        if MASKED:
            keys = tile + columns
            seen = keys[None, :] < seq_k
            if CAUSAL:
                seen = seen & (keys[None, :] <= positions[:, None])
            if WINDOW:
                seen = seen & (keys[None, :] > positions[:, None] - window)
            logits = tl.where(seen, logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, 1) * scale)
        subtract = new_highest
        if MASKED or BIAS:  # a row that has seen no key yet: -inf minus -inf would be NaN
            subtract = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(logits * scale - subtract[:, None])
        decay = tl.exp2(highest - subtract)
        total = total * decay + tl.sum(weights, 1)
        if DROPOUT:  # of what is multiplied with v; the sum is of all
            kept = is_kept(seed_ptr, threshold, plane, first_query, tile, BLOCK_M, BLOCK_N)
            weights = tl.where(kept, weights * keep_scale, 0.0)
        v = load_tile(v_ptr + offset * v_stride, v_stride, columns, seq_k - tile, MASKED, HEAD_DIM, BLOCK_D)
        acc = matmul(weights.to(v.dtype), v, acc * decay[:, None], PRECISION)
        highest = new_highest
    return acc, highest, total


@triton.jit(do_not_specialize=["seq_q", "seq_k", "window", "threshold"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, bias_ptr, seed_ptr,
    bias_batch_stride, bias_head_stride, bias_stride, bias_key_stride, threshold, keep_scale,
    q_batch_stride, q_stride, q_head_stride, k_batch_stride, k_stride, k_head_stride,
    v_batch_stride, v_stride, v_head_stride, heads, group, seq_q, seq_k, window, inner, factor,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0)
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    tile = tl.program_id(1)
    if CAUSAL:
        tile = tl.num_programs(1) - 1 - tile
    lse_stride = seq_q
    first_q, seq_q = span(cu_seqlens_q_ptr, batch, seq_q, PACKED)
    first_k, seq_k = span(cu_seqlens_k_ptr, batch, seq_k, PACKED)
    first_row = tile * BLOCK_M
    if first_row >= seq_q:
        return
    batch = batch.to(tl.int64)
    head = head.to(tl.int64)
    kv_head = head // group
    row_token = (first_q + first_row).to(tl.int64)
    key_token = first_k.to(tl.int64)
    if PACKED:
        lse_ptr += head * lse_stride + row_token
        out_ptr += row_token * heads * HEAD_DIM + head * HEAD_DIM
    else:
        lse_ptr += (batch * heads + head) * lse_stride + row_token
        out_ptr += (batch * lse_stride + row_token) * heads * HEAD_DIM + head * HEAD_DIM
        q_ptr += batch * q_batch_stride
        k_ptr += batch * k_batch_stride
        v_ptr += batch * v_batch_stride
    q_ptr += row_token * q_stride + head * q_head_stride
    k_ptr += key_token * k_stride + kv_head * k_head_stride
    v_ptr += key_token * v_stride + kv_head * v_head_stride

    bias_ptr += batch * bias_batch_stride + head * bias_head_stride
    rows = tl.arange(0, BLOCK_M)
    shift = seq_k - seq_q
    positions = first_row + rows + shift
    last_row = tl.minimum(first_row + BLOCK_M, seq_q) - 1
    q = load_tile(q_ptr, q_stride, rows, seq_q - first_row, True, HEAD_DIM, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if SINKS:  # a key whose value is zero, seen before all others
        highest = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)

    start, whole_start, whole_end, end = key_phases(first_row, last_row, shift, seq_k, window, CAUSAL, WINDOW, BLOCK_N)
    if WINDOW:
        acc, highest, total = _attend(
            acc, highest, total, q, k_ptr, v_ptr, k_stride, v_stride, start, whole_start, positions, seq_k, window,
            inner, factor, bias_ptr, bias_stride, bias_key_stride, seed_ptr, threshold, keep_scale, plane, first_row,
            seq_q, True, CAUSAL, WINDOW, SOFTCAP, BIAS, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, STAGES,
        )  # fmt: skip
    acc, highest, total = _attend(
        acc, highest, total, q, k_ptr, v_ptr, k_stride, v_stride, whole_start, whole_end, positions, seq_k, window,
        inner, factor, bias_ptr, bias_stride, bias_key_stride, seed_ptr, threshold, keep_scale, plane, first_row, seq_q,
        False, CAUSAL, WINDOW, SOFTCAP, BIAS, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, STAGES,
    )  # fmt: skip
    acc, highest, total = _attend(
        acc, highest, total, q, k_ptr, v_ptr, k_stride, v_stride, whole_end, end, positions, seq_k, window,
        inner, factor, bias_ptr, bias_stride, bias_key_stride, seed_ptr, threshold, keep_scale, plane, first_row, seq_q,
        True, CAUSAL, WINDOW, SOFTCAP, BIAS, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, STAGES,
    )  # fmt: skip

    empty = total == 0
    total = tl.where(empty, 1.0, total)
    store_tile(out_ptr, heads * HEAD_DIM, rows, seq_q - first_row, acc / total[:, None], HEAD_DIM, BLOCK_D)
    lse = tl.where(empty, float("-inf"), (highest + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + rows, lse, rows < seq_q - first_row)


class Launch(NamedTuple):
    """What both passes derive from one call's arguments."""

    packed: bool
    batch: int
    heads: int
    group: int
    seq_q: int  # tokens of q when packed
    seq_k: int
    longest_q: int
    longest_k: int
    bias: Tensor  # (batch, heads, seq_q, seq_k) by strides; any tensor where there is none
    seed: Tensor
    elements: tuple[int | float, ...]  # the bias's strides, the threshold of dropout, the factor of what is kept
    inner: float  # the factor inside tanh
    factor: float  # from q · k, or from its tanh, to logits in base 2
    constants: dict[str, bool | int | str]


def plan(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Launch:
    packed = cu_seqlens_q is not None
    seq_q, heads, head_dim = q.shape[-3:]
    seq_k = k.shape[-3]
    if not q.is_cuda:
        precision = "widened"
    else:
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    if bias is not None and max(bias.stride()[-2:], default=0) >= MAX_BIAS_STRIDE:
        bias = bias.contiguous()
    wide_bias = q if bias is None else bias.expand(q.shape[0], heads, seq_q, seq_k)
    bias_strides = (0,) * 4 if bias is None else wide_bias.stride()
    return Launch(
        packed=packed,
        batch=cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0],
        heads=heads,
        group=heads // k.shape[-2],
        seq_q=seq_q,
        seq_k=seq_k,
        longest_q=min(seq_q, max_seqlen_q) if packed and max_seqlen_q is not None else seq_q,
        longest_k=min(seq_k, max_seqlen_k) if packed and max_seqlen_k is not None else seq_k,
        bias=wide_bias,
        seed=q if seed is None else seed,
        elements=(*bias_strides, dropout_threshold(dropout), 1 / (1 - dropout)),
        inner=0.0 if softcap is None else scale / softcap,
        factor=(scale if softcap is None else softcap) / math.log(2),
        constants={
            "PACKED": packed,
            "CAUSAL": causal,
            "WINDOW": window is not None,
            "SOFTCAP": softcap is not None,
            "BIAS": bias is not None,
            "DROPOUT": dropout > 0,
            "HEAD_DIM": head_dim,
            "BLOCK_D": triton.next_power_of_2(head_dim),
            "PRECISION": precision,
        },
    )


def rows_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def strides(t: Tensor, packed: bool) -> tuple[int, int, int]:
    """(batch, token, head) strides."""
    return (0, t.stride(0), t.stride(1)) if packed else (t.stride(0), t.stride(1), t.stride(2))


def outputs_like(t: Tensor, packed: bool) -> Tensor:
    """Packed, tokens outside every sequence stay zero; otherwise every element is written."""
    return (torch.zeros if packed else torch.empty)(t.shape, dtype=t.dtype, device=t.device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    call = plan(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal, window, softcap, scale, bias, dropout, seed)
    out = outputs_like(q, call.packed)
    if call.packed:
        lse = torch.full((call.heads, call.seq_q), -torch.inf, dtype=torch.float32, device=q.device)
    else:
        lse = torch.empty((call.batch, call.heads, call.seq_q), dtype=torch.float32, device=q.device)
    cut = tiles("forward", q.shape[-1], q.dtype, capability(q.device), bias is not None or dropout > 0, q.device)
    grid = (call.batch * call.heads, triton.cdiv(call.longest_q, cut.block_m))
    if 0 in grid:
        return out, lse
    _forward_kernel[grid](
        q, k, v, q if sinks is None else sinks.contiguous(), out, lse,
        q if cu_seqlens_q is None else cu_seqlens_q, q if cu_seqlens_k is None else cu_seqlens_k,
        call.bias, call.seed, *call.elements,
        *strides(q, call.packed), *strides(k, call.packed), *strides(v, call.packed),
        call.heads, call.group, call.seq_q, call.seq_k, window or 0, call.inner, call.factor,
        **call.constants, SINKS=sinks is not None, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n,
        num_warps=cut.num_warps, STAGES=cut.num_stages,
    )  # fmt: skip
    return out, lse


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastlm.ops.attention import triton_backward  # it builds on this module

    return triton_backward.backward(*args)
