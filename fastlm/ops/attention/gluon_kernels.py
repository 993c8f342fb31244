"""The Hopper kernel of attention's forward pass, in Gluon.

A block of three warpgroups holds 128 queries of one head. One warp issues TMA copies of K and V tiles into rings of
shared-memory slots and does nothing else, so the 240 registers that the consumers need come out of its share. Two
consumer warpgroups hold 64 rows of queries each and spend their cycles on two asynchronous matrix products a tile
(wgmma: Q · Kᵀ from shared memory, P · V with P from registers) and one exp2 a logit. An SM of the H100 multiplies 256
times faster than it takes exp2, so exp2 must hide: a consumer issues Q · Kᵀ of a tile and P · V of the tile before
together, and takes the softmax of the first while the second runs (pipelining inside a warpgroup); and the consumers
take turns at issuing, so that one's softmax runs under the other's products (ping-pong). scale · log2(e) is folded into
the one multiply-add before exp2. Under a causal mask tiles past the diagonal are never loaded, the walk starts at
the diagonal, whose tiles alone are masked, and the longest walks start first. Design: FlashAttention-3 (Shah et al.,
2024, arXiv 2407.08608), sections 3.1 and 3.2.

The grid is plain, not persistent: the hardware gives the next tile of queries to the SM that is free first, which
evens out causal's uneven walks with no counter to share; the price is that a block's first loads and last stores are
hidden under no other block's work.
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

# Triton 3.9 renamed the copies.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

LN_2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # of queries a consumer: the rows of one wgmma
CONSUMERS = gl.constexpr(2)


@gluon.jit
def allocate_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """(NUMBER, 1) mbarriers, each of whose phases ends after COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def _fill(desc, smem, full, empty, i, batch, row, head, STAGES: gl.constexpr):
    """Load number i into its slot of a ring, once every consumer has given back what was there. A slot's barriers are
    in phase i // STAGES; of a fresh barrier the phase before counts as over."""
    slot = i % STAGES
    mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma_load(desc, [batch, row, head, 0], full.index(slot), smem.index(slot))


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
    batch, head, kv_head, first_row, count, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: `count` tiles, the last first, in the order in which they are read: V comes a step after its K."""
    mbarrier.expect(q_full.index(0), CONSUMERS * q_desc.block_type.nbytes)
    for consumer in gl.static_range(CONSUMERS):
        row = first_row + consumer * ROWS
        tma_load(q_desc, [batch, row, head, 0], q_full.index(0), q_smem.index(consumer))
    for i in range(count + 1):
        key = (count - 1 - i) * BLOCK_N
        if i < count:
            _fill(k_desc, k_smem, k_full, k_empty, i, batch, key, kv_head, STAGES)
        if i > 0:
            _fill(v_desc, v_smem, v_full, v_empty, i - 1, batch, key + BLOCK_N, kv_head, STAGES)


@gluon.jit
def _softmax(
    logits, highest, total, factor, positions, first_key, seq_k,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, LOGITS: gl.constexpr,
):  # fmt: skip
    """Online softmax of one tile, in base 2: (weights, decay of what came before, highest, total)."""
    if MASKED:
        keys = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LOGITS))
        seen = keys[None, :] < seq_k
        if CAUSAL:
            seen = seen & (keys[None, :] <= positions[:, None])
        logits = gl.where(seen, logits, float("-inf"))
    new_highest = gl.maximum(highest, gl.max(logits, 1) * factor)
    subtract = new_highest
    if MASKED:  # a row that has seen no key yet: -inf minus -inf would be NaN
        subtract = gl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = gl.exp2(gl.fma(logits, factor, -subtract[:, None]))
    decay = gl.exp2(highest - subtract)
    return weights, decay, new_highest, total * decay + gl.sum(weights, 1)


@gluon.jit
def _walk(
    acc, p, highest, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turns, start, end, count,
    positions, seq_k, factor, CONSUMER: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LOGITS: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Tiles start … end - 1 of the walk: Q · Kᵀ of tile i, and P · V of tile i - 1, whose weights are `p`."""
    for i in range(start, end):
        slot = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(turns.index(CONSUMER), (i if CONSUMER == 0 else i + 1) & 1)
        k = k_smem.index(slot).reshape([BLOCK_N, HEAD_DIM])
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
        logits = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)
        v = v_smem.index(before).reshape([BLOCK_N, HEAD_DIM])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        mbarrier.arrive(turns.index((CONSUMER + 1) % CONSUMERS))
        logits = warpgroup_mma_wait(1, [logits])
        mbarrier.arrive(k_empty.index(slot))
        first_key = (count - 1 - i) * BLOCK_N
        weights, decay, highest, total = _softmax(
            logits, highest, total, factor, positions, first_key, seq_k, MASKED, CAUSAL, BLOCK_N, LOGITS
        )  # fmt: skip
        next_p = gl.convert_layout(weights.to(k_smem.dtype), gl.DotOperandLayout(0, OUT, 2))
        # Waits for the next tile's K here, not at its use: ptxas moves no exp2 past this branch. Without it, it puts
        # the wait for P · V before the exponentials, and nothing hides them.
        mbarrier.wait(k_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < count)
        acc, p = warpgroup_mma_wait(0, [acc, p])
        mbarrier.arrive(v_empty.index(before))
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, OUT))[:, None]
        p = next_p
    return acc, p, highest, total


@gluon.jit
def _attend(
    out_desc, lse_ptr, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, turns,
    plane, batch, head, first_row, count, seq_q, seq_k, factor, CONSUMER: gl.constexpr, CAUSAL: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: ROWS queries against `count` tiles of keys."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    first_row += CONSUMER * ROWS
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS))
    positions = rows + (seq_k - seq_q)
    highest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
    total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, LOGITS))
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)

    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    q = q_smem.index(CONSUMER).reshape([ROWS, HEAD_DIM])
    k = k_smem.index(0).reshape([BLOCK_N, HEAD_DIM])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
    logits = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, [logits])
    mbarrier.arrive(k_empty.index(0))
    weights, _, highest, total = _softmax(
        logits, highest, total, factor, positions, (count - 1) * BLOCK_N, seq_k, True, CAUSAL, BLOCK_N, LOGITS
    )  # fmt: skip
    p = gl.convert_layout(weights.to(k_smem.dtype), gl.DotOperandLayout(0, OUT, 2))
    mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES, pred=count > 1)

    masked_end = gl.to_tensor(1)
    if CAUSAL:
        whole = gl.maximum(first_row + seq_k - seq_q + 1, 0) // BLOCK_N  # tiles that every row sees whole
        masked_end = gl.minimum(gl.maximum(count - whole, 1), count)
        acc, p, highest, total = _walk(
            acc, p, highest, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turns, 1, masked_end, count,
            positions, seq_k, factor, CONSUMER, True, CAUSAL, HEAD_DIM, BLOCK_N, STAGES, LOGITS, OUT,
        )  # fmt: skip
    acc, p, highest, total = _walk(
        acc, p, highest, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turns, masked_end, count, count,
        positions, seq_k, factor, CONSUMER, False, CAUSAL, HEAD_DIM, BLOCK_N, STAGES, LOGITS, OUT,
    )  # fmt: skip

    last = (count - 1) % STAGES
    mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_smem.index(last).reshape([BLOCK_N, HEAD_DIM]), acc, is_async=True)
    empty = total == 0
    total = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), (highest + gl.log2(total)) * LN_2)
    gl.store(lse_ptr + gl.cast(plane, gl.int64) * seq_q + rows, lse, rows < seq_q)
    acc, p = warpgroup_mma_wait(0, [acc, p])
    acc = acc * gl.convert_layout(1 / total, gl.SliceLayout(1, OUT))[:, None]
    q.store(acc.to(k_smem.dtype))  # the last product with these queries is over
    fence_async_shared()
    tma_store(out_desc, [batch, first_row, head, 0], q_smem.index(CONSUMER))  # rows beyond seq_q are not written
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "group", "seq_q", "seq_k"])
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, heads, group, seq_q, seq_k, factor,
    CAUSAL: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Descriptors are of (batch, seq, heads, HEAD_DIM), in blocks of (1, ROWS or BLOCK_N, 1, HEAD_DIM)."""
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
    count = gl.maximum((end + BLOCK_N - 1) // BLOCK_N, 1)  # queries that see no key walk over one tile, all masked

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, ROWS, 1, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], v_desc.layout)
    q_full = allocate_barriers(1, 1)
    k_full = allocate_barriers(STAGES, 1)
    v_full = allocate_barriers(STAGES, 1)
    k_empty = allocate_barriers(STAGES, CONSUMERS)
    v_empty = allocate_barriers(STAGES, CONSUMERS)
    turns = allocate_barriers(CONSUMERS, 1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_attend, (
                out_desc, lse_ptr, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, turns,
                plane, batch, head, first_row, count, seq_q, seq_k, factor, 0, CAUSAL, HEAD_DIM, BLOCK_N, STAGES,
            )),
            (_attend, (
                out_desc, lse_ptr, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty, turns,
                plane, batch, head, first_row, count, seq_q, seq_k, factor, 1, CAUSAL, HEAD_DIM, BLOCK_N, STAGES,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
                batch, head, head // group, first_row, count, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],  # warps of the second consumer and of the producer; the first consumer is the launch's four
        [240, 24],  # their registers a thread; the first consumer gets what is left of the SM's, 240
    )  # fmt: skip
