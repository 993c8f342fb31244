"""The backward pass of FlashAttention-2 in Triton (Dao, arXiv 2307.08691, algorithm 2), without atomics.

Nothing of the forward's logits was kept, so they are computed again from q, k and the log-sum-exp, twice: one kernel
gives each program a tile of keys and walks over the queries, for every query head of the group in turn, to sum grad_k
and grad_v in registers; another gives each program a tile of queries and walks over the keys to sum grad_q. That is
seven matrix products where a kernel with atomic additions to grad_q needs five; the price buys the same bits at every
run and no fp32 buffer for grad_q. As in the forward, only tiles on an edge are masked, tiles unseen are skipped, and
the longest walks start first. Each walk reads its operands once a tile, mostly from L2; the rest of the memory traffic
is a first, small kernel that reads out and grad_out for delta = rowsum(out · grad_out).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.attention.reference import sinks_gradient
from fastlm.ops.attention.tiles import tiles
from fastlm.ops.attention.triton import (
    LOG2_E,
    capability,
    key_phases,
    load_tile,
    matmul,
    outputs_like,
    plan,
    rows_contiguous,
    span,
    store_tile,
    strides,
    tanh,
)
from fastlm.ops.attention.triton_elements import is_kept, load_bias


@triton.jit
def _delta_kernel(
    out_ptr, grad_out_ptr, grad_lse_ptr, delta_ptr, grad_batch_stride, grad_stride, grad_head_stride, heads, seq,
    GRAD_LSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    left = seq - token
    out_ptr += ((batch * seq + token) * heads + head) * HEAD_DIM
    grad_out_ptr += batch * grad_batch_stride + token * grad_stride + head * grad_head_stride
    out = load_tile(out_ptr, heads * HEAD_DIM, rows, left, True, HEAD_DIM, BLOCK_D).to(tl.float32)
    grad_out = load_tile(grad_out_ptr, grad_stride, rows, left, True, HEAD_DIM, BLOCK_D).to(tl.float32)
    delta = tl.sum(out * grad_out, 1)
    row = (batch * heads + head) * seq + token + rows
    if GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + row, rows < left, 0.0)
    tl.store(delta_ptr + row, delta, rows < left)


@triton.jit
def _key_gradients(
    grad_k, grad_v, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, q_stride, grad_stride,
    start, whole_start, whole_end, end, keys, first_key, shift, seq_q, seq_k, window, inner, factor,
    bias_ptr, bias_stride, bias_key_stride, seed_ptr, threshold, keep_scale, plane,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Everything here is transposed: keys are rows, queries columns, so that no product needs a transposed register.

    The branch that masks tiles outside [whole_start, whole_end) is the same for all threads. Three copies of the loop,
    as in the forward, would not fit the registers.
    """
    columns = tl.arange(0, BLOCK_M)
    for tile in tl.range(start, end, BLOCK_M, num_stages=STAGES):
        offset = tl.cast(tile, tl.int64)
        left = seq_q - tile
        q = load_tile(q_ptr + offset * q_stride, q_stride, columns, left, True, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + offset + columns, columns < left, 0.0)
        logits = matmul(k, tl.trans(q), None, PRECISION)
        if SOFTCAP:
            logits = tanh(logits * inner)
        if BIAS:
            bias = load_bias(
                bias_ptr, bias_stride, bias_key_stride, tile, first_key, seq_q, seq_k, BLOCK_M, BLOCK_N, True
            )  # fmt: skip
            lse = tl.where(lse == float("-inf"), 0.0, lse)  # of a row whose every key the bias hides
            weights = tl.exp2(logits * factor + (bias - lse[None, :]) * LOG2_E)
        else:
            weights = tl.exp2(logits * factor - (lse * LOG2_E)[None, :])
        if (tile < whole_start) | (tile >= whole_end):
            positions = tile + columns + shift
            seen = columns[None, :] < left
            if CAUSAL:
                seen = seen & (keys[:, None] <= positions[None, :])
            if WINDOW:
                seen = seen & (keys[:, None] > positions[None, :] - window)
            weights = tl.where(seen, weights, 0.0)
        grad_out = load_tile(grad_out_ptr + offset * grad_stride, grad_stride, columns, left, True, HEAD_DIM, BLOCK_D)
        delta = tl.load(delta_ptr + offset + columns, columns < left, 0.0)
        if DROPOUT:
            kept = tl.trans(is_kept(seed_ptr, threshold, plane, tile, first_key, BLOCK_M, BLOCK_N))
            dropped = tl.where(kept, weights * keep_scale, 0.0)
            grad_v = matmul(dropped.to(grad_out.dtype), grad_out, grad_v, PRECISION)
            grad_weights = tl.where(kept, matmul(v, tl.trans(grad_out), None, PRECISION) * keep_scale, 0.0)
            grad_logits = weights * (grad_weights - delta[None, :])
        else:
            grad_v = matmul(weights.to(grad_out.dtype), grad_out, grad_v, PRECISION)
            grad_logits = weights * (matmul(v, tl.trans(grad_out), None, PRECISION) - delta[None, :])
        if SOFTCAP:
            grad_logits *= 1 - logits * logits
        grad_k = matmul(grad_logits.to(q.dtype), q, grad_k, PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["seq_q", "seq_k", "window", "threshold"])
def _key_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    bias_ptr, seed_ptr, bias_batch_stride, bias_head_stride, bias_stride, bias_key_stride, threshold, keep_scale,
    q_batch_stride, q_stride, q_head_stride, k_batch_stride, k_stride, k_head_stride,
    v_batch_stride, v_stride, v_head_stride, grad_batch_stride, grad_stride, grad_head_stride,
    kv_heads, group, seq_q, seq_k, window, inner, factor, scale,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0) // kv_heads
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    tokens_q = seq_q
    tokens_k = seq_k
    first_q, seq_q = span(cu_seqlens_q_ptr, batch, seq_q, PACKED)
    first_k, seq_k = span(cu_seqlens_k_ptr, batch, seq_k, PACKED)
    first_key = tl.program_id(1) * BLOCK_N
    if first_key >= seq_k:
        return
    plane = tl.program_id(0) * group  # of the first head of the group, as (batch, head) are counted
    batch = batch.to(tl.int64)
    row_token = first_q.to(tl.int64)
    key_token = (first_k + first_key).to(tl.int64)
    head = kv_head * group
    bias_ptr += batch * bias_batch_stride + head * bias_head_stride
    lse_offset = head * tokens_q + row_token
    grad_k_offset = key_token * kv_heads * HEAD_DIM + kv_head * HEAD_DIM
    if not PACKED:
        lse_offset += batch * kv_heads * group * tokens_q
        grad_k_offset += batch * tokens_k * kv_heads * HEAD_DIM
        q_ptr += batch * q_batch_stride
        k_ptr += batch * k_batch_stride
        v_ptr += batch * v_batch_stride
        grad_out_ptr += batch * grad_batch_stride
    k_ptr += key_token * k_stride + kv_head * k_head_stride
    v_ptr += key_token * v_stride + kv_head * v_head_stride
    q_ptr += row_token * q_stride + head * q_head_stride
    grad_out_ptr += row_token * grad_stride + head * grad_head_stride

    rows = tl.arange(0, BLOCK_N)
    keys = first_key + rows
    left = seq_k - first_key
    shift = seq_k - seq_q
    last_key = tl.minimum(first_key + BLOCK_N, seq_k) - 1
    start = first_key * 0
    whole_start = start
    end = seq_q + start
    whole_end = seq_q // BLOCK_M * BLOCK_M
    if CAUSAL:
        start = tl.maximum(first_key - shift, 0) // BLOCK_M * BLOCK_M
        whole_start = (tl.maximum(last_key - shift, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if WINDOW:
        end = tl.minimum(end, tl.maximum(last_key - shift + window, 0))
        whole_end = tl.minimum(whole_end, tl.maximum(first_key - shift + window, 0) // BLOCK_M * BLOCK_M)
    whole_start = tl.minimum(whole_start, (end + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
    whole_start = tl.maximum(whole_start, start)
    whole_end = tl.maximum(whole_end, whole_start)

    k = load_tile(k_ptr, k_stride, rows, left, True, HEAD_DIM, BLOCK_D)
    v = load_tile(v_ptr, v_stride, rows, left, True, HEAD_DIM, BLOCK_D)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for _ in range(group):
        lse_row = lse_ptr + lse_offset
        delta_row = delta_ptr + lse_offset
        grad_k, grad_v = _key_gradients(
            grad_k, grad_v, k, v, q_ptr, grad_out_ptr, lse_row, delta_row, q_stride, grad_stride,
            start, whole_start, whole_end, end, keys, first_key, shift, seq_q, seq_k, window, inner, factor,
            bias_ptr, bias_stride, bias_key_stride, seed_ptr, threshold, keep_scale, plane,
            CAUSAL, WINDOW, SOFTCAP, BIAS, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, STAGES,
        )  # fmt: skip
        plane += 1
        bias_ptr += bias_head_stride
        q_ptr += q_head_stride
        grad_out_ptr += grad_head_stride
        lse_offset += tokens_q
    stride = kv_heads * HEAD_DIM
    store_tile(grad_k_ptr + grad_k_offset, stride, rows, left, grad_k * scale, HEAD_DIM, BLOCK_D)
    store_tile(grad_v_ptr + grad_k_offset, stride, rows, left, grad_v, HEAD_DIM, BLOCK_D)


@triton.jit
def _query_gradient(
    grad_q, q, grad_out, lse, delta, k_ptr, v_ptr, k_stride, v_stride, start, whole_start, whole_end, end,
    positions, seq_k, window, inner, factor,
    bias_ptr, grad_bias_ptr, bias_stride, bias_key_stride, seed_ptr, threshold, keep_scale, plane, first_query, seq_q,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    for tile in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        offset = tl.cast(tile, tl.int64)
        left = seq_k - tile
        k = load_tile(k_ptr + offset * k_stride, k_stride, columns, left, True, HEAD_DIM, BLOCK_D)
        logits = matmul(q, tl.trans(k), None, PRECISION)
        if SOFTCAP:
            logits = tanh(logits * inner)
        if BIAS:
            bias = load_bias(
                bias_ptr, bias_stride, bias_key_stride, first_query, tile, seq_q, seq_k, BLOCK_M, BLOCK_N, False
            )  # fmt: skip
            weights = tl.exp2(logits * factor + bias * LOG2_E - lse[:, None])
        else:
            weights = tl.exp2(logits * factor - lse[:, None])
        if (tile < whole_start) | (tile >= whole_end):
            keys = tile + columns
            seen = columns[None, :] < left
            if CAUSAL:
                seen = seen & (keys[None, :] <= positions[:, None])
            if WINDOW:
                seen = seen & (keys[None, :] > positions[:, None] - window)
            weights = tl.where(seen, weights, 0.0)
        v = load_tile(v_ptr + offset * v_stride, v_stride, columns, left, True, HEAD_DIM, BLOCK_D)
        grad_weights = matmul(grad_out, tl.trans(v), None, PRECISION)
        if DROPOUT:
            kept = is_kept(seed_ptr, threshold, plane, first_query, tile, BLOCK_M, BLOCK_N)
            grad_weights = tl.where(kept, grad_weights * keep_scale, 0.0)
        grad_logits = weights * (grad_weights - delta[:, None])
        if BIAS_GRAD:
            rows = tl.arange(0, BLOCK_M)
            ptrs = grad_bias_ptr + tl.cast(first_query, tl.int64) * seq_k + tile
            inside = (rows < seq_q - first_query)[:, None] & (columns < left)[None, :]
            tl.store(ptrs + (rows[:, None] * seq_k + columns[None, :]), grad_logits, inside)
        if SOFTCAP:
            grad_logits *= 1 - logits * logits
        grad_q = matmul(grad_logits.to(k.dtype), k, grad_q, PRECISION)
    return grad_q


@triton.jit(do_not_specialize=["seq_q", "seq_k", "window", "threshold"])
def _query_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr, grad_bias_ptr, cu_seqlens_q_ptr,
    cu_seqlens_k_ptr, bias_ptr, seed_ptr, bias_batch_stride, bias_head_stride, bias_stride, bias_key_stride, threshold,
    keep_scale, q_batch_stride, q_stride, q_head_stride, k_batch_stride, k_stride, k_head_stride,
    v_batch_stride, v_stride, v_head_stride, grad_batch_stride, grad_stride, grad_head_stride,
    heads, group, seq_q, seq_k, window, inner, factor, scale,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    BIAS_GRAD: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0)
    batch = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)
    if CAUSAL:
        tile = tl.num_programs(1) - 1 - tile
    tokens_q = seq_q
    first_q, seq_q = span(cu_seqlens_q_ptr, batch, seq_q, PACKED)
    first_k, seq_k = span(cu_seqlens_k_ptr, batch, seq_k, PACKED)
    first_row = tile * BLOCK_M
    if first_row >= seq_q:
        return
    batch = batch.to(tl.int64)
    kv_head = head // group
    row_token = (first_q + first_row).to(tl.int64)
    key_token = first_k.to(tl.int64)
    lse_offset = head * tokens_q + row_token
    grad_q_ptr += row_token * heads * HEAD_DIM + head * HEAD_DIM
    if not PACKED:
        lse_offset += batch * heads * tokens_q
        grad_q_ptr += batch * tokens_q * heads * HEAD_DIM
        q_ptr += batch * q_batch_stride
        k_ptr += batch * k_batch_stride
        v_ptr += batch * v_batch_stride
        grad_out_ptr += batch * grad_batch_stride
    q_ptr += row_token * q_stride + head * q_head_stride
    grad_out_ptr += row_token * grad_stride + head * grad_head_stride
    k_ptr += key_token * k_stride + kv_head * k_head_stride
    v_ptr += key_token * v_stride + kv_head * v_head_stride

    bias_ptr += batch * bias_batch_stride + head * bias_head_stride
    if BIAS_GRAD:
        grad_bias_ptr += (batch * heads + head) * seq_q * seq_k
    rows = tl.arange(0, BLOCK_M)
    left = seq_q - first_row
    shift = seq_k - seq_q
    positions = first_row + rows + shift
    last_row = tl.minimum(first_row + BLOCK_M, seq_q) - 1
    q = load_tile(q_ptr, q_stride, rows, left, True, HEAD_DIM, BLOCK_D)
    grad_out = load_tile(grad_out_ptr, grad_stride, rows, left, True, HEAD_DIM, BLOCK_D)
    lse = tl.load(lse_ptr + lse_offset + rows, rows < left, 0.0) * LOG2_E
    if BIAS:
        lse = tl.where(lse == float("-inf"), 0.0, lse)  # of a row whose every key the bias hides
    delta = tl.load(delta_ptr + lse_offset + rows, rows < left, 0.0)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    start, whole_start, whole_end, end = key_phases(first_row, last_row, shift, seq_k, window, CAUSAL, WINDOW, BLOCK_N)
    grad_q = _query_gradient(
        grad_q, q, grad_out, lse, delta, k_ptr, v_ptr, k_stride, v_stride, start, whole_start, whole_end, end,
        positions, seq_k, window, inner, factor,
        bias_ptr, grad_bias_ptr, bias_stride, bias_key_stride, seed_ptr, threshold, keep_scale, plane, first_row, seq_q,
        CAUSAL, WINDOW, SOFTCAP, BIAS, BIAS_GRAD, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, STAGES,
    )  # fmt: skip
    store_tile(grad_q_ptr, heads * HEAD_DIM, rows, left, grad_q * scale, HEAD_DIM, BLOCK_D)


def row_deltas(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None, lse: Tensor, packed: bool) -> Tensor:
    """The row sums of out · grad_out, less grad_lse: like lse, which is contiguous."""
    delta = torch.empty_like(lse)
    seq, heads, head_dim = out.shape[-3:]
    if delta.numel():
        rows = delta.numel() // (heads * seq)  # batch, or 1 when packed
        block = 32
        _delta_kernel[(rows * heads, triton.cdiv(seq, block))](
            out.contiguous(), grad_out, out if grad_lse is None else grad_lse.contiguous(), delta,
            *strides(grad_out, packed), heads, seq,
            GRAD_LSE=grad_lse is not None, HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_M=block,
        )  # fmt: skip
    return delta


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
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
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, grad_out = (rows_contiguous(t) for t in (q, k, v, grad_out))
    call = plan(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal, window, softcap, scale, bias, dropout, seed)
    grad_q, grad_k, grad_v = (outputs_like(t, call.packed) for t in (q, k, v))
    none = q.new_empty(0)
    chip = capability(q.device)
    kv_heads = call.heads // call.group
    lse = lse.contiguous()
    delta = row_deltas(out, grad_out, grad_lse, lse, call.packed)
    inputs = (q, k, v, grad_out, lse, delta)
    offsets = (q if cu_seqlens_q is None else cu_seqlens_q, q if cu_seqlens_k is None else cu_seqlens_k)
    elements = (call.bias, call.seed, *call.elements)
    all_strides = tuple(stride for t in (q, k, v, grad_out) for stride in strides(t, call.packed))
    scalars = (call.group, call.seq_q, call.seq_k, window or 0, call.inner, call.factor, scale)

    has_elements = bias is not None or dropout > 0
    cut = tiles("keys", q.shape[-1], q.dtype, chip, has_elements, q.device)
    grid = (call.batch * kv_heads, triton.cdiv(call.longest_k, cut.block_n))
    if 0 not in grid:
        _key_kernel[grid](
            *inputs, grad_k, grad_v, *offsets, *elements, *all_strides, kv_heads, *scalars, **call.constants,
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, num_warps=cut.num_warps, STAGES=cut.num_stages,
        )  # fmt: skip
    wide_grad_bias = none
    if bias is not None and bias_grad:
        # Tiles that no row sees are not written. What the bias shares among heads or sequences is summed in fp32.
        full = call.bias.shape == bias.shape
        wide_grad_bias = torch.zeros(call.bias.shape, dtype=bias.dtype if full else torch.float32, device=q.device)
    cut = tiles("queries", q.shape[-1], q.dtype, chip, has_elements, q.device)
    grid = (call.batch * call.heads, triton.cdiv(call.longest_q, cut.block_m))
    if 0 not in grid:
        _query_kernel[grid](
            *inputs, grad_q, wide_grad_bias, *offsets, *elements, *all_strides, call.heads, *scalars, **call.constants,
            BIAS_GRAD=bias_grad,
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, num_warps=cut.num_warps, STAGES=cut.num_stages,
        )  # fmt: skip
    grad_sinks = none if sinks is None else sinks_gradient(delta, lse, sinks).to(sinks.dtype)
    grad_bias = none
    if bias is not None and bias_grad:
        grad_bias = wide_grad_bias.sum_to_size(bias.shape).to(bias.dtype)
    return grad_q, grad_k, grad_v, grad_bias, grad_sinks
