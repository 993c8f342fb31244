"""The most probable tokens of each row in Triton: one program a row finds the n-th largest logit as the sampling kernel
does, gathers exactly n tokens (of equals at the edge, the lowest ids), and ranks them by comparing each with each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlm.ops.sampling.triton_search import (
    INFINITY_KEY,
    LARGEST_FLOAT,
    LOG2_E,
    add_online,
    append,
    largest_bound,
    load_tile,
    online_total,
    search,
    to_key,
    to_value,
)

GROUP = tl.constexpr(64)  # tokens ranked at a time
LAST_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["row_stride", "vocab_size", "n"])
def top_kernel(
    logits_ptr, valid_ptr, gathered_ptr, ids_ptr, logprobs_ptr, row_stride, vocab_size, n,
    TILES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`gathered_ptr`: scratch, (batch, n) int64. A token there is its key, then its id inverted."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * (row_stride // VECTOR * VECTOR)
    gathered_ptr += row * n
    ids_ptr += row * n
    logprobs_ptr += row * n
    group = tl.arange(0, GROUP)
    if tl.load(valid_ptr + row) == 0:
        for i in range(0, n, GROUP):
            tl.store(ids_ptr + i + group, tl.zeros((GROUP,), tl.int64), i + group < n)
            tl.store(logprobs_ptr + i + group, tl.full((GROUP,), float("nan"), tl.float32), i + group < n)
        return

    largest = ()
    for _t in tl.static_range(TILES):
        largest = append(largest, tl.full((LANES, VECTOR), -INFINITY_KEY, tl.int32))
    highest = tl.full((LANES,), -LARGEST_FLOAT, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab_size, TILES * LANES * VECTOR):
        new_largest = ()
        for t in tl.static_range(TILES):
            x = load_tile(row_ptr, start + t * LANES * VECTOR, vocab_size, LANES, VECTOR)
            new_largest = append(new_largest, tl.maximum(largest[t], to_key(x)))
            highest, total = add_online(highest, total, x, LOG2_E)
        largest = new_largest
    max_logit = tl.max(highest)
    log_mass = tl.log(online_total(highest, total, max_logit, LOG2_E)).to(tl.float32)

    high = to_key(max_logit) + 1
    low = largest_bound(largest, largest, n, high * 0 - INFINITY_KEY, high, False, TILES)
    low, high, count_high, _ = search(
        row_ptr, vocab_size, low, high, n, max_logit, LOG2_E, 0.0, False, False, False, TILES, LANES, VECTOR
    )  # fmt: skip

    found_above = 0
    found_equal = 0
    for start in range(0, vocab_size, LANES * VECTOR):
        ids = start + tl.arange(0, LANES * VECTOR)
        keys = to_key(tl.load(row_ptr + ids, ids < vocab_size, float("-inf")).to(tl.float32))
        above = keys >= high
        equal = (keys >= low) & (keys < high) & (ids < vocab_size)
        if tl.max((above | equal).to(tl.int32)) > 0:
            rank_above = found_above + tl.cumsum(above.to(tl.int32), 0) - 1
            rank_equal = count_high + found_equal + tl.cumsum(equal.to(tl.int32), 0) - 1
            entry = (keys.to(tl.int64) << 32) | (ids ^ LAST_ID).to(tl.int64)
            tl.store(gathered_ptr + rank_above, entry, above)
            tl.store(gathered_ptr + rank_equal, entry, equal & (rank_equal < n))
            found_above += tl.sum(above.to(tl.int32))
            found_equal += tl.sum(equal.to(tl.int32))
    tl.debug_barrier()  # what other threads gathered is read below

    for i in range(0, n, GROUP):
        entries = tl.load(gathered_ptr + i + group, i + group < n, 0)
        rank = tl.zeros((GROUP,), tl.int32)
        for j in range(0, n, GROUP):
            others = tl.load(gathered_ptr + j + group, j + group < n, -(1 << 63))
            rank += tl.sum((others[None, :] > entries[:, None]).to(tl.int32), 1)
        tl.store(ids_ptr + rank, (entries & LAST_ID) ^ LAST_ID, i + group < n)
        logits = to_value((entries >> 32).to(tl.int32))
        tl.store(logprobs_ptr + rank, (logits - max_logit) - log_mass, i + group < n)
