"""The Hopper kernels of attention's backward pass, in Gluon: one for dK and dV, one for dQ.

Both are built as the forward is: a warp that only loads, and two consumer warpgroups of 64 rows. In the first kernel a
consumer keeps 64 keys and walks over tiles of queries of every head of its group; in the second it keeps 64 queries and
walks over tiles of keys. The first computes logits transposed, so that in both the weights and the gradients of the
logits are left operands of the next products as they stand in registers: through shared memory goes only what TMA
brings. The cycles go to seven products a pair of tiles, and two exp2 a logit: two products and one exp2 more than one
kernel would take that adds into dQ by atomics, as FlashAttention-3's does (arXiv 2407.08608), and for them the
gradients are the same on every run. exp2 runs under dO · Vᵀ and, in the first kernel, the gradients of the logits are
made under Pᵀ · dO; what is left bare runs under the other consumer's products.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastlm.ops.attention.gluon_kernels import CONSUMERS, ROWS, allocate_barriers, tma_load, tma_store

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _load_queries(
    q_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc, q_smem, grad_smem, k_smem, v_smem, lse_smem, delta_smem,
    own, full, empty, batch, kv_head, group, heads, pitch, first_key, start, count,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer of the first kernel: keys and values once; then for each head the last tile of queries, which may
    reach beyond the end, and those from `start` on."""
    mbarrier.expect(own.index(0), CONSUMERS * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for consumer in gl.static_range(CONSUMERS):
        key = first_key + consumer * ROWS
        tma_load(k_desc, [batch, key, kv_head, 0], own.index(0), k_smem.index(consumer))
        tma_load(v_desc, [batch, key, kv_head, 0], own.index(0), v_smem.index(consumer))
    SIZE: gl.constexpr = 2 * (q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
    for i in range(group * count):
        slot = i % STAGES
        head = kv_head * group + i // count
        row = _tile_of_queries(i % count, count, start, BLOCK_M)
        mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(slot), SIZE)
        tma_load(q_desc, [batch, row, head, 0], full.index(slot), q_smem.index(slot))
        tma_load(grad_desc, [batch, row, head, 0], full.index(slot), grad_smem.index(slot))
        offset = (batch * heads + head) * pitch + row
        tma_load(lse_desc, [offset], full.index(slot), lse_smem.index(slot))
        tma_load(delta_desc, [offset], full.index(slot), delta_smem.index(slot))


@gluon.jit
def _tile_of_queries(j, count, start, BLOCK_M: gl.constexpr):
    """The first query of step j of a walk over `count` tiles from `start`: the last tile comes first, masked."""
    return start + (j + count - 1) % count * BLOCK_M


@gluon.jit
def _walk_queries(
    grad_k, grad_v, k, v, q_smem, grad_smem, lse_smem, delta_smem, full, empty, done, first, last, count, start,
    keys, shift, seq_q, factor, MASKED: gl.constexpr, CAUSAL: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, LOGITS: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Steps first … last - 1 of one head's walk; `done` steps were taken for the heads before."""
    columns: gl.constexpr = gl.SliceLayout(0, LOGITS)
    for j in range(first, last):
        slot = (done + j) % STAGES
        mbarrier.wait(full.index(slot), (done + j) // STAGES & 1)
        q = q_smem.index(slot).reshape([BLOCK_M, HEAD_DIM])
        grad = grad_smem.index(slot).reshape([BLOCK_M, HEAD_DIM])
        zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, LOGITS)
        if MASKED:
            centred = zeros
        else:
            centred = zeros - delta_smem.index(slot).load(columns)[None, :]
        logits = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        grad_weights = warpgroup_mma(v, grad.permute((1, 0)), centred, use_acc=not MASKED, is_async=True)
        lse = lse_smem.index(slot).load(columns) * LOG2_E
        logits = warpgroup_mma_wait(1, [logits])
        if MASKED:  # what stands behind the last query is another head's, or nothing
            queries = _tile_of_queries(j, count, start, BLOCK_M) + gl.arange(0, BLOCK_M, layout=columns)
            lse = gl.where(queries < seq_q, lse, float("inf"))
        weights = gl.exp2(gl.fma(logits, factor, -lse[None, :]))
        if MASKED and CAUSAL:
            weights = gl.where(keys[:, None] <= (queries + shift)[None, :], weights, 0.0)
        p = gl.convert_layout(weights.to(q_smem.dtype), gl.DotOperandLayout(0, OUT, 2))
        grad_v = warpgroup_mma(p, grad, grad_v, is_async=True)
        grad_weights = warpgroup_mma_wait(1, [grad_weights])
        if MASKED:
            delta = gl.where(queries < seq_q, delta_smem.index(slot).load(columns), 0.0)
            grad_logits = weights * (grad_weights - delta[None, :])
        else:
            grad_logits = weights * grad_weights
        ds = gl.convert_layout(grad_logits.to(q_smem.dtype), gl.DotOperandLayout(0, OUT, 2))
        grad_k = warpgroup_mma(ds, q, grad_k, is_async=True)
        grad_v, grad_k, p, ds = warpgroup_mma_wait(0, [grad_v, grad_k, p, ds])
        mbarrier.arrive(empty.index(slot))
    return grad_k, grad_v


@gluon.jit
def _keys_gradients(
    grad_k_desc, grad_v_desc, q_smem, grad_smem, k_smem, v_smem, lse_smem, delta_smem, own, full, empty,
    batch, kv_head, group, first_key, start, count, seq_q, seq_k, factor, scale, CONSUMER: gl.constexpr,
    CAUSAL: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer of the first kernel: dK and dV of ROWS keys."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    first_key += CONSUMER * ROWS
    keys = first_key + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS))
    shift = seq_k - seq_q
    masked = gl.to_tensor(1)
    if CAUSAL:  # tiles whose first query does not see the last key stand at the diagonal
        before = gl.maximum(first_key + ROWS - 1 - shift - start + BLOCK_M - 1, 0) // BLOCK_M
        masked = gl.minimum(before + 1, count)
    grad_k = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
    grad_v = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
    mbarrier.wait(own.index(0), 0)
    k = k_smem.index(CONSUMER).reshape([ROWS, HEAD_DIM])
    v = v_smem.index(CONSUMER).reshape([ROWS, HEAD_DIM])
    for head in range(group):
        grad_k, grad_v = _walk_queries(
            grad_k, grad_v, k, v, q_smem, grad_smem, lse_smem, delta_smem, full, empty, head * count, 0, masked, count,
            start, keys, shift, seq_q, factor, True, CAUSAL, HEAD_DIM, BLOCK_M, STAGES, LOGITS, OUT,
        )  # fmt: skip
        grad_k, grad_v = _walk_queries(
            grad_k, grad_v, k, v, q_smem, grad_smem, lse_smem, delta_smem, full, empty, head * count, masked, count,
            count, start, keys, shift, seq_q, factor, False, CAUSAL, HEAD_DIM, BLOCK_M, STAGES, LOGITS, OUT,
        )  # fmt: skip
    k.store((grad_k * scale).to(k_smem.dtype))  # the last products with these keys and values are over
    v.store(grad_v.to(k_smem.dtype))
    fence_async_shared()
    tma_store(grad_k_desc, [batch, first_key, kv_head, 0], k_smem.index(CONSUMER))
    tma_store(grad_v_desc, [batch, first_key, kv_head, 0], v_smem.index(CONSUMER))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["kv_heads", "group", "seq_q", "seq_k"])
def keys_kernel(
    q_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc, grad_k_desc, grad_v_desc, kv_heads, group, seq_q, seq_k,
    factor, scale, CAUSAL: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV. Descriptors are of (batch, seq, heads, HEAD_DIM); of lse and delta, of all their elements in a row,
    in which each head has seq_q of them and as many more as make a multiple of 16 bytes, where TMA can start."""
    batch = gl.program_id(0) // kv_heads
    kv_head = gl.program_id(0) % kv_heads
    first_key = gl.program_id(1) * (ROWS * CONSUMERS)  # under a causal mask the first keys have the longest walks
    start = 0
    if CAUSAL:
        start = gl.maximum(first_key - (seq_k - seq_q), 0) // BLOCK_M * BLOCK_M
    # Keys that no query sees walk over one tile, all masked.
    count = gl.maximum((seq_q - start + BLOCK_M - 1) // BLOCK_M, 1)

    k_smem = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, 1, ROWS, 1, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [CONSUMERS, 1, ROWS, 1, HEAD_DIM], v_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, BLOCK_M, 1, HEAD_DIM], q_desc.layout)
    grad_smem = gl.allocate_shared_memory(grad_desc.dtype, [STAGES, 1, BLOCK_M, 1, HEAD_DIM], grad_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    own = allocate_barriers(1, 1)
    full = allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, CONSUMERS)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_keys_gradients, (
                grad_k_desc, grad_v_desc, q_smem, grad_smem, k_smem, v_smem, lse_smem, delta_smem, own, full, empty,
                batch, kv_head, group, first_key, start, count, seq_q, seq_k, factor, scale, 0, CAUSAL, HEAD_DIM,
                BLOCK_M, STAGES,
            )),
            (_keys_gradients, (
                grad_k_desc, grad_v_desc, q_smem, grad_smem, k_smem, v_smem, lse_smem, delta_smem, own, full, empty,
                batch, kv_head, group, first_key, start, count, seq_q, seq_k, factor, scale, 1, CAUSAL, HEAD_DIM,
                BLOCK_M, STAGES,
            )),
            (_load_queries, (
                q_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc, q_smem, grad_smem, k_smem, v_smem, lse_smem,
                delta_smem, own, full, empty, batch, kv_head, group, kv_heads * group, (seq_q + 3) // 4 * 4, first_key,
                start, count, BLOCK_M, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _load_keys(
    q_desc, grad_desc, k_desc, v_desc, q_smem, grad_smem, k_smem, v_smem, own, k_full, v_full, empty,
    batch, head, kv_head, first_row, count, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer of the second kernel: queries and the gradient of out once, then keys and values, the last first."""
    mbarrier.expect(own.index(0), CONSUMERS * (q_desc.block_type.nbytes + grad_desc.block_type.nbytes))
    for consumer in gl.static_range(CONSUMERS):
        row = first_row + consumer * ROWS
        tma_load(q_desc, [batch, row, head, 0], own.index(0), q_smem.index(consumer))
        tma_load(grad_desc, [batch, row, head, 0], own.index(0), grad_smem.index(consumer))
    for i in range(count):
        slot = i % STAGES
        phase = i // STAGES & 1
        key = (count - 1 - i) * BLOCK_N
        mbarrier.wait(empty.index(slot), phase ^ 1)  # K's, which is read last
        mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
        tma_load(k_desc, [batch, key, kv_head, 0], k_full.index(slot), k_smem.index(slot))
        mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
        tma_load(v_desc, [batch, key, kv_head, 0], v_full.index(slot), v_smem.index(slot))


@gluon.jit
def _walk_keys(
    grad_q, q, grad, lse, delta, k_smem, v_smem, k_full, v_full, empty, start, end, count, positions, seq_k,
    factor, MASKED: gl.constexpr, CAUSAL: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, LOGITS: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    for i in range(start, end):
        slot = i % STAGES
        phase = i // STAGES & 1
        k = k_smem.index(slot).reshape([BLOCK_N, HEAD_DIM])
        v = v_smem.index(slot).reshape([BLOCK_N, HEAD_DIM])
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
        logits = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(slot), phase)
        grad_weights = warpgroup_mma(grad, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(1, [logits])
        weights = gl.exp2(gl.fma(logits, factor, -lse[:, None]))
        if MASKED:
            keys = (count - 1 - i) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LOGITS))
            seen = keys[None, :] < seq_k
            if CAUSAL:
                seen = seen & (keys[None, :] <= positions[:, None])
            weights = gl.where(seen, weights, 0.0)
        # As in the forward: a branch here keeps ptxas from waiting for the product before it takes exp2.
        mbarrier.wait(k_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < count)
        grad_weights = warpgroup_mma_wait(0, [grad_weights])
        grad_logits = weights * (grad_weights - delta[:, None])
        ds = gl.convert_layout(grad_logits.to(k_smem.dtype), gl.DotOperandLayout(0, OUT, 2))
        grad_q = warpgroup_mma(ds, k, grad_q, is_async=True)
        grad_q, ds = warpgroup_mma_wait(0, [grad_q, ds])
        mbarrier.arrive(empty.index(slot))
    return grad_q


@gluon.jit
def _queries_gradient(
    grad_q_desc, lse_ptr, delta_ptr, q_smem, grad_smem, k_smem, v_smem, own, k_full, v_full, empty,
    plane, batch, head, first_row, count, seq_q, seq_k, factor, scale, CONSUMER: gl.constexpr, CAUSAL: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer of the second kernel: dQ of ROWS queries."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    first_row += CONSUMER * ROWS
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS))
    positions = rows + (seq_k - seq_q)
    offsets = gl.cast(plane, gl.int64) * seq_q + rows
    lse = gl.load(lse_ptr + offsets, rows < seq_q, 0.0) * LOG2_E
    delta = gl.load(delta_ptr + offsets, rows < seq_q, 0.0)
    masked_end = gl.to_tensor(1)
    if CAUSAL:
        whole = gl.maximum(first_row + seq_k - seq_q + 1, 0) // BLOCK_N
        masked_end = gl.minimum(gl.maximum(count - whole, 1), count)
    grad_q = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
    mbarrier.wait(own.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    q = q_smem.index(CONSUMER).reshape([ROWS, HEAD_DIM])
    grad = grad_smem.index(CONSUMER).reshape([ROWS, HEAD_DIM])
    grad_q = _walk_keys(
        grad_q, q, grad, lse, delta, k_smem, v_smem, k_full, v_full, empty, 0, masked_end, count, positions,
        seq_k, factor, True, CAUSAL, HEAD_DIM, BLOCK_N, STAGES, LOGITS, OUT,
    )  # fmt: skip
    grad_q = _walk_keys(
        grad_q, q, grad, lse, delta, k_smem, v_smem, k_full, v_full, empty, masked_end, count, count,
        positions, seq_k, factor, False, CAUSAL, HEAD_DIM, BLOCK_N, STAGES, LOGITS, OUT,
    )  # fmt: skip
    q.store((grad_q * scale).to(k_smem.dtype))
    fence_async_shared()
    tma_store(grad_q_desc, [batch, first_row, head, 0], q_smem.index(CONSUMER))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "group", "seq_q", "seq_k"])
def queries_kernel(
    q_desc, grad_desc, k_desc, v_desc, grad_q_desc, lse_ptr, delta_ptr, heads, group, seq_q, seq_k, factor, scale,
    CAUSAL: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ. Descriptors are of (batch, seq, heads, HEAD_DIM)."""
    gl.static_assert(STAGES >= 2)  # the next K is awaited before this one is given back
    plane = gl.program_id(0)
    tile = gl.program_id(1)
    if CAUSAL:
        tile = gl.num_programs(1) - 1 - tile
    batch = plane // heads
    head = plane % heads
    first_row = tile * (ROWS * CONSUMERS)
    end = seq_k
    if CAUSAL:
        end = gl.minimum(first_row + ROWS * CONSUMERS, seq_q) + seq_k - seq_q
    count = gl.maximum((end + BLOCK_N - 1) // BLOCK_N, 1)

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, ROWS, 1, HEAD_DIM], q_desc.layout)
    grad_smem = gl.allocate_shared_memory(grad_desc.dtype, [CONSUMERS, 1, ROWS, 1, HEAD_DIM], grad_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], v_desc.layout)
    own = allocate_barriers(1, 1)
    k_full = allocate_barriers(STAGES, 1)
    v_full = allocate_barriers(STAGES, 1)
    empty = allocate_barriers(STAGES, CONSUMERS)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_queries_gradient, (
                grad_q_desc, lse_ptr, delta_ptr, q_smem, grad_smem, k_smem, v_smem, own, k_full, v_full, empty,
                plane, batch, head, first_row, count, seq_q, seq_k, factor, scale, 0, CAUSAL, HEAD_DIM,
                BLOCK_N, STAGES,
            )),
            (_queries_gradient, (
                grad_q_desc, lse_ptr, delta_ptr, q_smem, grad_smem, k_smem, v_smem, own, k_full, v_full, empty,
                plane, batch, head, first_row, count, seq_q, seq_k, factor, scale, 1, CAUSAL, HEAD_DIM,
                BLOCK_N, STAGES,
            )),
            (_load_keys, (
                q_desc, grad_desc, k_desc, v_desc, q_smem, grad_smem, k_smem, v_smem, own, k_full, v_full, empty,
                batch, head, head // group, first_row, count, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
