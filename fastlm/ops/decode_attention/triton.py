"""Flash-decoding in Triton: one launch that attends to splits of each sequence, and one that combines the splits.

A program of the first takes one split of one KV head of one sequence. The query heads that share that KV head, for all
of the sequence's new tokens, are the rows of one tile, 16 at least, so that each key and value is read once and meets
the tensor cores. It walks over the split by tiles, whose tokens are fetched two tiles ahead, and whose block ids one
tile before that; an online softmax (arXiv 1805.02867) keeps the maximum, the sum and the unnormalised
output of each row, which go to memory in fp32. A program of the second reads those of one row, all splits in order.
Where one split holds the longest sequence that the table allows, the first writes the result itself, in the same bits.

Where all sequences begin with the same blocks (`num_shared_tokens`), the rows of several sequences fill one tile for
each split that lies wholly in them: in the cascade of FlashInfer (arXiv 2501.01005, section 3.1) the prefix is read
once for so many of them as fit. 16 rows are 4 sequences of a model with groups of 4, 16 without groups; tiles higher
than those of a call without sharing would read less often, but multiply and add in another order. As it is, each row
meets the same tiles of tokens in the same order and in the same shape, so its bits are those of that call. A sequence
whose splits have another size than the first's, as far longer ones do, is left out of the sharing.

Reading the cache is what takes the time: every byte of it is read once, and at 16 rows a tile the tensor cores have a
tenth of the work that they could do meanwhile. The splits' results add group · head_dim · 4 bytes, written and read,
for each 2 · 128 · head_dim elements of the cache: 3 % in bf16 with groups of 4, mostly in L2.

A split has 128 tokens, or as many more as make 64 splits of a sequence: enough programs for a chip when there is one
sequence, and a bounded workspace when it is long. That depends on the sequence's own length and window alone, as does
the order of every sum: so a sequence gives the same bits whatever shares its batch. Flash-decoding: Dao et al., 2023;
the packing of grouped heads: FlashInfer, arXiv 2501.01005, section 3.2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.attention.triton import LOG2_E, capability, matmul, tanh
from fastlm.ops.decode_attention import MAX_QUERY_LEN, QUANTIZED

MIN_SPLIT = 128  # tokens; two tiles, both in flight at once
MAX_SPLITS = 64  # of the tokens that a sequence's queries see, and one more where a window starts inside a split
COMBINE_WARPS = 8
COMBINED = 32  # splits that the second kernel takes at a time, whatever their number, so that sums keep their order


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
    head_dim, chip = q.shape[-1], capability(q.device)
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"supports fp32, bf16 and fp16, not {q.dtype}"
    if head_dim % 8 or not 16 <= head_dim <= 512:
        return f"supports head_dim 16 to 512 in steps of 8, not {head_dim}"
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return "needs caches whose last dimension is contiguous"
    if 0 < chip < 80 and torch.bfloat16 in (q.dtype, k_cache.dtype):
        return "needs compute capability 8.0 for bf16; use fp16"
    if 0 < chip < 89 and k_cache.dtype == torch.float8_e4m3fn:
        return "needs compute capability 8.9 for fp8; use int8"
    return None


class Tiles(NamedTuple):
    """Query rows and keys a tile, warps a program, tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tiles(rows: int, head_dim: int, exact: bool, quantized: bool, chip: int) -> Tiles:
    """`rows` share a KV head; `exact`: products in fp32; `chip`: 80 for sm_80, 0 if interpreted.

    Three stages keep two tiles of keys and values on their way: 64 KiB a program where there are 227 KiB of shared
    memory, 32 KiB where there may be 99, so that three programs fit a multiprocessor.
    """
    large = 90 <= chip < 110
    most_rows = 16 if head_dim > 128 else 32 if head_dim > 64 and not large else 64
    block_m = min(max(triton.next_power_of_2(rows), 16), most_rows)
    if chip == 0:
        return Tiles(block_m, 16, 1, 1)
    if exact or chip < 80:
        return Tiles(16, 16, 4 if head_dim <= 64 else 8, 3 if head_dim <= 128 else 2)
    most_bytes = 16 * 1024 if large else 8 * 1024
    block_n = min(max(most_bytes // (2 * triton.next_power_of_2(head_dim)), 32 if quantized else 16), 64)
    many = (block_m > 16 and block_m * head_dim > 4096) or (quantized and head_dim > 128)  # registers
    return Tiles(block_m, block_n, 8 if many else 4, 3)


@triton.jit
def _extent(
    length_ptr, most, query_len, window,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    MAX_QUERY_LEN: tl.constexpr,
):  # fmt: skip
    """A sequence's length, the first token that any query sees, tokens a split, the first split, the number of splits.

    And whether the length is one: where it is not, it is taken as 0, and the result will be NaN. Or those of several.
    """
    length = tl.load(length_ptr)
    is_length = (length >= 0) & (length <= most)
    length = tl.where(is_length, length, 0)
    first = length * 0
    span = length
    if WINDOW:
        first = tl.maximum(length - query_len - window + 1, 0)
        span = tl.minimum(length, window + MAX_QUERY_LEN - 1)  # not query_len: one query alone gives the same bits
    size = tl.maximum(tl.cdiv(tl.cdiv(span, MAX_SPLITS), BLOCK_N) * BLOCK_N, MIN_SPLIT)
    first_split = first // size
    return length, first, size, first_split, tl.cdiv(length, size) - first_split, is_length


@triton.jit
def _finish(highest, total, sink, SINKS: tl.constexpr):
    """What the output must be multiplied by, then divided by. A sink is a key whose value is zero."""
    shrink = tl.zeros_like(total) + 1.0
    if SINKS:
        new_highest = tl.maximum(highest, sink)
        subtract = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink = tl.exp2(highest - subtract)
        total = tl.fma(total, shrink, tl.exp2(sink - subtract))
    return shrink, tl.where(total == 0, 1.0, total)


@triton.jit
def _widened(tile, dtype: tl.constexpr, SCALED: tl.constexpr):
    """By way of fp32 where it is int8 or fp8: the interpreter knows no other."""
    if SCALED:
        tile = tile.to(tl.float32)
    return tile.to(dtype)


@triton.jit(do_not_specialize=["table_stride", "table_width", "blocks", "slots", "window", "batch_size"])
def _split_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sinks_ptr, table_ptr, lengths_ptr,
    num_shared_ptr, out_ptr, acc_ptr, highest_ptr, total_ptr, q_batch_stride, q_stride, q_head_stride,
    k_block_stride, k_slot_stride, k_head_stride, v_block_stride, v_slot_stride, v_head_stride,
    k_scale_block_stride, k_scale_slot_stride, k_scale_head_stride,
    v_scale_block_stride, v_scale_slot_stride, v_scale_head_stride,
    table_stride, table_width, blocks, slots, kv_heads, group, query_len, window, inner, factor,
    batch_size,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
    DIRECT: tl.constexpr, CASCADE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr, MAX_QUERY_LEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    num_rows = query_len * group
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    program = tl.program_id(0)
    if CASCADE:
        # The first programs take the shared splits, for the rows of all sequences, by the first one's table.
        shared_tiles = tl.cdiv(batch_size * num_rows, BLOCK_M)
        is_shared = program < shared_tiles * kv_heads
        program = tl.where(is_shared, program, program - shared_tiles * kv_heads)
        row_tiles = tl.where(is_shared, shared_tiles, row_tiles)
    row_tile = program % row_tiles
    kv_head = (program // row_tiles % kv_heads).to(tl.int64)
    batch = program // row_tiles // kv_heads
    slot = tl.program_id(1)
    length, first, size, first_split, splits, is_length = _extent(
        lengths_ptr + batch, table_width * BLOCK_SIZE, query_len, window,
        WINDOW, BLOCK_N, MIN_SPLIT, MAX_SPLITS, MAX_QUERY_LEN,
    )  # fmt: skip
    if CASCADE:
        shared_length, _, shared_size, _, _, _ = _extent(
            lengths_ptr, table_width * BLOCK_SIZE, query_len, window,
            WINDOW, BLOCK_N, MIN_SPLIT, MAX_SPLITS, MAX_QUERY_LEN,
        )  # fmt: skip
        shares = (size == shared_size) & (shared_length > 0)
        shared_splits = tl.where(shares, tl.load(num_shared_ptr) // size, 0)
        if tl.where(is_shared, slot >= shared_splits, (slot < shared_splits) | (slot >= splits)):
            return
    elif not DIRECT:  # noqa: SIM102  (this decides when compiling)
        if slot >= splits:
            return

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_rows
    row_batch, row_length = batch, length
    if CASCADE:  # rows of other sequences, but of none whose splits are longer
        is_row = rows < tl.where(is_shared, batch_size * num_rows, num_rows)
        row_batch += tl.where(is_row, rows // num_rows, 0)
        rows %= num_rows
        row_length, _, row_size, _, _, _ = _extent(
            lengths_ptr + row_batch, table_width * BLOCK_SIZE, query_len, window,
            WINDOW, BLOCK_N, MIN_SPLIT, MAX_SPLITS, MAX_QUERY_LEN,
        )  # fmt: skip
        is_row = is_row & (row_size == size)
    query = rows // group
    head = kv_head * group + rows % group
    positions = row_length - query_len + query
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM
    q_offsets = row_batch.to(tl.int64) * q_batch_stride + query * q_stride + head * q_head_stride
    q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], is_row[:, None] & is_dim[None, :], 0.0)
    if WIDE:
        q = q.to(tl.float32)
    table_ptr += batch.to(tl.int64) * table_stride
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    columns = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)

    start = (first_split + slot) * size
    end = tl.minimum(start + size, length)
    start = tl.maximum(start, first // BLOCK_N * BLOCK_N)
    # Block ids are fetched one tile before their tokens, so that the loop's own loads do not wait for one another.
    tokens = start + columns
    next_block = tl.load(table_ptr + tokens // BLOCK_SIZE, (tokens >= first) & (tokens < end), 0)
    for tile in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        block = next_block
        tokens = tile + columns
        inside = (tokens >= first) & (tokens < end)
        next_tokens = tokens + BLOCK_N
        next_block = tl.load(table_ptr + next_tokens // BLOCK_SIZE, next_tokens < end, 0)
        known = (block >= 0) & (block < blocks)
        wanted = inside & known
        block = tl.where(wanted, block, 0).to(tl.int64)
        in_block = tokens % BLOCK_SIZE
        mask = wanted[:, None] & is_dim[None, :]
        k = tl.load(k_ptr + (block * k_block_stride + in_block * k_slot_stride)[:, None] + dims[None, :], mask, 0.0)
        logits = matmul(q, tl.trans(_widened(k, q.dtype, SCALED)), None, PRECISION)
        if SCALED:
            offsets = block * k_scale_block_stride + in_block * k_scale_slot_stride + kv_head * k_scale_head_stride
            logits *= tl.load(k_scale_ptr + offsets, wanted, 0.0)[None, :]
        if SOFTCAP:
            logits = tanh(logits * inner)
        logits *= factor
        seen = inside[None, :] & (tokens[None, :] <= positions[:, None])
        if WINDOW:
            seen = seen & (tokens[None, :] > positions[:, None] - window)
        logits = tl.where(known[None, :], logits, float("nan"))
        logits = tl.where(seen, logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        subtract = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(logits - subtract[:, None])
        decay = tl.exp2(highest - subtract)
        total = total * decay + tl.sum(weights, 1)
        if SCALED:
            offsets = block * v_scale_block_stride + in_block * v_scale_slot_stride + kv_head * v_scale_head_stride
            weights *= tl.load(v_scale_ptr + offsets, wanted, 0.0)[None, :]
        v = tl.load(v_ptr + (block * v_block_stride + in_block * v_slot_stride)[:, None] + dims[None, :], mask, 0.0)
        acc = matmul(weights.to(q.dtype), _widened(v, q.dtype, SCALED), acc * decay[:, None], PRECISION)
        highest = new_highest

    mask = is_row[:, None] & is_dim[None, :]
    heads = kv_heads * group
    if DIRECT:
        sink = highest
        if SINKS:
            sink = tl.load(sinks_ptr + head, is_row, 0.0).to(tl.float32) * LOG2_E
        shrink, divisor = _finish(highest, total, sink, SINKS)
        out = tl.where(is_length, acc * shrink[:, None] / divisor[:, None], float("nan"))
        at = ((row_batch.to(tl.int64) * query_len + query) * heads + head)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask)
    else:
        row = ((row_batch.to(tl.int64) * slots + slot) * query_len + query) * heads + head
        tl.store(acc_ptr + row[:, None] * HEAD_DIM + dims[None, :], acc, mask)
        tl.store(highest_ptr + row, highest, is_row)
        tl.store(total_ptr + row, total, is_row)


@triton.jit(do_not_specialize=["table_width", "slots", "window"])
def _combine_kernel(
    acc_ptr, highest_ptr, total_ptr, sinks_ptr, lengths_ptr, out_ptr, table_width, slots, heads, query_len, window,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    MAX_QUERY_LEN: tl.constexpr, COMBINED: tl.constexpr,
):  # fmt: skip
    num_rows = query_len * heads
    batch = (tl.program_id(0) // num_rows).to(tl.int64)
    row = tl.program_id(0) % num_rows
    _, _, _, _, splits, is_length = _extent(
        lengths_ptr + batch, table_width * BLOCK_SIZE, query_len, window,
        WINDOW, BLOCK_N, MIN_SPLIT, MAX_SPLITS, MAX_QUERY_LEN,
    )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM
    acc = tl.zeros((BLOCK_D,), tl.float32)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, splits, COMBINED):
        slot = start + tl.arange(0, COMBINED)
        is_slot = slot < splits
        at = (batch * slots + slot) * num_rows + row
        its_highest = tl.load(highest_ptr + at, is_slot, float("-inf"))
        its_total = tl.load(total_ptr + at, is_slot, 0.0)
        its_acc = tl.load(
            acc_ptr + at[:, None] * HEAD_DIM + dims[None, :], is_slot[:, None] & is_dim[None, :], 0.0
        )  # fmt: skip
        new_highest = tl.maximum(highest, tl.max(its_highest, 0))
        subtract = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        decay = tl.exp2(highest - subtract)
        weights = tl.exp2(its_highest - subtract)
        total = total * decay + tl.sum(weights * its_total, 0)
        acc = acc * decay + tl.sum(weights[:, None] * its_acc, 0)
        highest = new_highest
    sink = highest
    if SINKS:
        sink = tl.load(sinks_ptr + row % heads).to(tl.float32) * LOG2_E
    shrink, divisor = _finish(highest, total, sink, SINKS)
    out = tl.where(is_length, acc * shrink / divisor, float("nan"))
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), is_dim)


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
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    num_shared_tokens: Tensor | None = None,
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    context_lens = context_lens.contiguous()
    batch, query_len, heads, head_dim = q.shape
    blocks, block_size, kv_heads, _ = k_cache.shape
    group, table_width = heads // kv_heads, block_table.shape[1]
    most = table_width * block_size
    window_size = 0 if window is None else min(window, most + MAX_QUERY_LEN)
    quantized = k_cache.dtype in QUANTIZED
    mixed = k_cache.dtype != q.dtype and not quantized
    cut = tiles(query_len * group, head_dim, mixed or q.dtype == torch.float32, quantized, capability(q.device))
    slots = max(min(triton.cdiv(most, MIN_SPLIT), MAX_SPLITS + (window is not None)), 1)
    direct = slots == 1
    rows = query_len * group
    row_tiles = triton.cdiv(rows, cut.block_m)
    shared_tiles = 0
    # Windows leave the prefix behind; beyond 256 dimensions there are no registers left for the rows' own sequences.
    if num_shared_tokens is not None and not direct and window is None and head_dim <= 256:
        shared_tiles = triton.cdiv(batch * rows, cut.block_m)
        if shared_tiles == batch * row_tiles:  # not one tile fewer
            shared_tiles = 0
    workspace = 0 if direct else batch * slots * query_len * heads
    acc = torch.empty((workspace, head_dim), dtype=torch.float32, device=q.device)
    highest, total = (torch.empty(workspace, dtype=torch.float32, device=q.device) for _ in range(2))
    if not q.is_cuda:
        precision = "widened"
    else:
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    shared = {
        "WINDOW": window is not None,
        "SINKS": sinks is not None,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": block_size,
        "BLOCK_N": cut.block_n,
        "MIN_SPLIT": MIN_SPLIT,
        "MAX_SPLITS": MAX_SPLITS,
        "MAX_QUERY_LEN": MAX_QUERY_LEN,
    }
    sinks = q if sinks is None else sinks.contiguous()
    scales = (q, q) if k_scale is None or v_scale is None else (k_scale, v_scale)
    scale_strides = (0,) * 6 if k_scale is None or v_scale is None else (*k_scale.stride(), *v_scale.stride())
    _split_kernel[((shared_tiles + batch * row_tiles) * kv_heads, slots)](
        q, k_cache, v_cache, *scales, sinks, block_table, context_lens,
        q if num_shared_tokens is None else num_shared_tokens, out, acc, highest, total,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *scale_strides,
        block_table.stride(0), table_width, blocks, slots, kv_heads, group, query_len, window_size,
        0.0 if softcap is None else scale / softcap, (scale if softcap is None else softcap) / math.log(2),
        batch,
        SOFTCAP=softcap is not None, SCALED=quantized, WIDE=mixed, DIRECT=direct, CASCADE=shared_tiles > 0,
        BLOCK_M=cut.block_m, PRECISION=precision, STAGES=cut.num_stages, num_warps=cut.num_warps, **shared,
    )  # fmt: skip
    if not direct:
        _combine_kernel[(batch * query_len * heads,)](
            acc, highest, total, sinks, context_lens, out, table_width, slots, heads, query_len, window_size,
            COMBINED=COMBINED, num_warps=COMBINE_WARPS, **shared,
        )  # fmt: skip
    return out
