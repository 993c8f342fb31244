"""Sampling in Triton: one launch, one program a row, no sort, and nothing of the vocabulary's size written.

A filter is a threshold among the row's logits, and a threshold is found by narrowing an interval: one pass over the row
counts the tokens above several pivots at once and sums their weights (`triton_search.search`). The first pass, which
finds the maximum, also keeps the largest logit of each of 4096 positions; the k-th largest of those is a lower bound
that is nearly always the threshold itself, and so is the nucleus taken among them. So the usual row takes four passes:
the maximum, one that confirms top-k, one that confirms top-p, and the draw, which sums the kept weights of each block
and then looks inside the one that u falls in (inverse CDF; Philox, Salmon et al., SC 2011). Bounds that are not
confirmed are narrowed fivefold a pass, at first evenly in value, then in the integers that order floats, so that a row
whatever its logits ends within some twenty passes, at one exact logit, its equals kept together. The idea of pivots
instead of a sort is FlashInfer's (Ye et al., arXiv 2501.01005). Weights are summed within threads in fp32 and from
there in fp64, in an order that vocab_size and dtype fix: a row's result does not depend on the batch.

Memory traffic: a read of the row for each pass. Prediction, not measured, for an H100 (3.35 TB/s, 132 SMs), batch 128,
131,072 fp32 logits, top-k and top-p: 67 MB a pass, 20 us from memory, less what L2 keeps; the two confirming passes are
bound by their 44 instructions an element instead, 25 us; with the reductions between passes 0.11 to 0.13 ms in all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.sampling.triton_penalties import penalized
from fastlm.ops.sampling.triton_search import (
    INFINITY_KEY,
    LARGEST_FLOAT,
    LOG2_E,
    MAGNITUDE,
    add_online,
    append,
    largest_bound,
    load_tile,
    online_total,
    search,
    to_key,
    to_value,
    weigh,
)
from fastlm.ops.sampling.triton_top import top_kernel
from fastlm.ops.sampling.triton_typical import kept_weights, typical

NUM_WARPS = 16
LANES = 32 * NUM_WARPS
ELEMENTS_PER_THREAD = 8  # in flight: 16 KB a multiprocessor in fp32; with 16, accumulators spill
CHUNK = tl.constexpr(128)  # tokens among which the draw searches last


def supports(logits: Tensor, **kwargs: object) -> str | None:
    if logits.shape[1] > 2**30:
        return f"supports vocabularies up to 2^30, not {logits.shape[1]}"
    return None


@triton.jit
def _uniform(seed, position):
    """u in [0, 1) with 53 random bits."""
    zero = tl.full((), 0, tl.uint32)
    position = position.to(tl.uint64)
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    word0, word1, _, _ = tl.philox(seed.to(tl.uint64), low, high, zero, zero)
    bits = (word0.to(tl.uint64) << 21) | (word1 >> 11).to(tl.uint64)
    return bits.to(tl.float64) * 2.0**-53


@triton.jit
def _locate(masses, before, target, COUNT: tl.constexpr):
    """The first of COUNT masses at which `before` + the running sum exceeds `target`, and the sum before it.

    Rounding may leave the target above the last sum: then it is the last mass that is not zero.
    """
    ids = tl.arange(0, COUNT)
    running = before + tl.cumsum(masses, 0)
    first = tl.min(tl.where((running > target) & (masses > 0), ids, COUNT))
    last = tl.max(tl.where(masses > 0, ids, 0))
    found = tl.minimum(first, last)
    return found, before + tl.sum(tl.where(ids < found, masses, 0.0))


@triton.jit
def _draw(
    row_ptr, vocab_size, threshold, max_logit, scale, min_p, uniform,
    MIN_P: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    near=None, nearest=None,
):  # fmt: skip
    """The drawn id and the mass of all kept tokens: the block is found first, then the chunk in it, then the token."""
    blocks = tl.zeros((BLOCKS,), tl.float64)
    size: tl.constexpr = TILES * LANES * VECTOR
    for start in range(0, vocab_size, size):
        masses = tl.zeros((LANES,), tl.float32)
        for t in tl.static_range(TILES):
            x = load_tile(row_ptr, start + t * LANES * VECTOR, vocab_size, LANES, VECTOR)
            masses += tl.sum(kept_weights(x, threshold, max_logit, scale, min_p, MIN_P, near, nearest), 1)
        blocks = tl.where(tl.arange(0, BLOCKS) == start // size, tl.sum(masses.to(tl.float64)), blocks)
    total = tl.sum(blocks)
    target = uniform * total
    before = tl.full((), 0.0, tl.float64)
    block, before = _locate(blocks, before, target, BLOCKS)

    first = block * size
    chunks: tl.constexpr = size // CHUNK
    ids = first + tl.arange(0, chunks)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x = tl.load(row_ptr + ids, ids < vocab_size, float("-inf")).to(tl.float32)
    weights = kept_weights(x, threshold, max_logit, scale, min_p, MIN_P, near, nearest)
    masses = tl.sum(weights.to(tl.float64), 1)
    chunk, before = _locate(masses, before, target, chunks)

    first += chunk * CHUNK
    ids = first + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + ids, ids < vocab_size, float("-inf")).to(tl.float32)
    masses = kept_weights(x, threshold, max_logit, scale, min_p, MIN_P, near, nearest).to(tl.float64)
    token, before = _locate(masses, before, target, CHUNK)
    return first + token, total


@triton.jit
def _finite(x):
    return tl.abs(x) <= LARGEST_FLOAT


@triton.jit(do_not_specialize=["row_stride", "raw_stride", "vocab_size"])
def _sample_kernel(
    logits_ptr, raw_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, typical_p_ptr,
    repetition_ptr, presence_ptr, frequency_ptr, seed_ptr, position_ptr,
    ids_ptr, valid_ptr, logprobs_ptr, processed_ptr, row_stride, raw_stride, vocab_size,
    MIN_P_FIRST: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * (row_stride // VECTOR * VECTOR)
    temperature = tl.load(temperature_ptr + row)
    divisor = tl.where(temperature > 0, temperature, 1.0)
    scale = tl.minimum(tl.div_rn(tl.full((), LOG2_E, tl.float32), divisor), LARGEST_FLOAT)

    # One pass: the largest logit of each position in the tiles, the least finite one, NaNs, and sums of exp.
    largest = ()
    for _t in tl.static_range(TILES):
        largest = append(largest, tl.full((LANES, VECTOR), -INFINITY_KEY, tl.int32))
    least = tl.full((LANES,), INFINITY_KEY, tl.int32)
    magnitude = tl.zeros((LANES,), tl.int32)
    highest = tl.full((LANES,), -LARGEST_FLOAT, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    raw_highest = highest
    raw_total = total
    for start in range(0, vocab_size, TILES * LANES * VECTOR):
        new_largest = ()
        for t in tl.static_range(TILES):
            first = start + t * LANES * VECTOR
            x = load_tile(row_ptr, first, vocab_size, LANES, VECTOR)
            keys = to_key(x)
            new_largest = append(new_largest, tl.maximum(largest[t], keys))
            least = tl.minimum(least, tl.min(tl.where(keys > -INFINITY_KEY, keys, INFINITY_KEY), 1))
            magnitude = tl.maximum(magnitude, tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, 1))
            if top_p_ptr is not None:
                highest, total = add_online(highest, total, x, scale)
            if logprobs_ptr is not None:
                if raw_ptr is not None:
                    raw_row_ptr = raw_ptr + row * (raw_stride // VECTOR * VECTOR)
                    x = load_tile(raw_row_ptr, first, vocab_size, LANES, VECTOR)
                raw_highest, raw_total = add_online(raw_highest, raw_total, x, LOG2_E)
        largest = new_largest
    max_key = -INFINITY_KEY
    for t in tl.static_range(TILES):
        max_key = tl.maximum(max_key, tl.max(tl.max(largest[t], 1)))
    max_logit = to_value(max_key)
    mass_of_all = online_total(highest, total, max_logit, scale)
    raw_max = tl.max(raw_highest)
    raw_log_mass = tl.log(online_total(raw_highest, raw_total, raw_max, LOG2_E)).to(tl.float32)
    valid = (tl.max(magnitude) <= INFINITY_KEY) & (max_key < INFINITY_KEY) & (max_key > -INFINITY_KEY)
    valid = valid & (temperature >= 0) & _finite(temperature)
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + row)
        valid = valid & (top_k >= 0)
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + row)
        valid = valid & (top_p >= 0) & _finite(top_p)
    min_p = 0.0
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + row)
        valid = valid & (min_p >= 0) & (min_p <= 1)
    if typical_p_ptr is not None:
        typical_p = tl.load(typical_p_ptr + row)
        valid = valid & (typical_p >= 0) & _finite(typical_p)
    if repetition_ptr is not None:
        repetition = tl.load(repetition_ptr + row)
        valid = valid & (repetition > 0) & _finite(repetition)
    if presence_ptr is not None:
        valid = valid & _finite(tl.load(presence_ptr + row))
    if frequency_ptr is not None:
        valid = valid & _finite(tl.load(frequency_ptr + row))

    token = 0
    logprob = float("nan")
    processed = float("nan")
    if valid:
        low = tl.min(least)
        high = max_key + 1
        FLOOR: tl.constexpr = MIN_P_FIRST and min_p_ptr is not None
        if temperature == 0:
            low = high - 1
        else:
            mass = tl.full((), -1.0, tl.float64)  # of the tokens that filters have kept so far
            if top_k_ptr is not None:  # noqa: SIM102  (this decides when compiling, the next for a row)
                if (top_k > 0) & (top_k < vocab_size):
                    low = largest_bound(largest, largest, top_k, low, high, False, TILES)
                    low, _, _, mass = search(
                        row_ptr, vocab_size, low, high, top_k, max_logit, scale, min_p,
                        False, top_p_ptr is not None, FLOOR, TILES, LANES, VECTOR,
                    )  # fmt: skip
            if top_p_ptr is not None:  # noqa: SIM102
                if top_p < 1:
                    if mass < 0:
                        if FLOOR:
                            _, mass = _draw(
                                row_ptr, vocab_size, low, max_logit, scale, min_p, mass * 0,
                                True, BLOCKS, TILES, LANES, VECTOR,
                            )  # fmt: skip
                        else:
                            mass = mass_of_all
                    goal = top_p.to(tl.float64) * mass
                    weights = ()
                    for t in tl.static_range(TILES):
                        weights = append(weights, weigh(to_value(largest[t]), max_logit, scale, min_p, FLOOR))
                    low = largest_bound(largest, weights, goal, low, high, True, TILES)
                    low, _, _, _ = search(
                        row_ptr, vocab_size, low, high, goal, max_logit, scale, min_p,
                        True, True, FLOOR, TILES, LANES, VECTOR,
                    )  # fmt: skip
        near = None
        nearest = None
        if typical_p_ptr is not None:
            nearest = low * 0 - INFINITY_KEY  # keeps all
            center = 0.0
            center_rest = 0.0
            if (typical_p < 1) & (temperature > 0):
                center, center_rest, nearest = typical(
                    row_ptr, vocab_size, low, typical_p, max_logit, divisor, scale, min_p,
                    min_p_ptr is not None, TILES, LANES, VECTOR,
                )  # fmt: skip
            near = (divisor, center, center_rest)
        uniform = _uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row))
        uniform = tl.where(temperature > 0, uniform, 0.0)  # the first of the largest, which alone are kept
        token, mass = _draw(
            row_ptr, vocab_size, low, max_logit, scale, min_p, uniform,
            min_p_ptr is not None, BLOCKS, TILES, LANES, VECTOR, near, nearest,
        )  # fmt: skip
        if logprobs_ptr is not None:
            x = tl.load(row_ptr + token).to(tl.float32)
            raw = x
            if raw_ptr is not None:
                raw = tl.load(raw_ptr + row * (raw_stride // VECTOR * VECTOR) + token).to(tl.float32)
            logprob = (raw - raw_max) - raw_log_mass
            processed = 0.0
            if temperature > 0:
                processed = tl.div_rn(x - max_logit, temperature) - tl.log(mass).to(tl.float32)
    tl.store(ids_ptr + row, token)
    tl.store(valid_ptr + row, valid)
    if logprobs_ptr is not None:
        tl.store(logprobs_ptr + row, logprob)
        tl.store(processed_ptr + row, processed)


def _tiles(logits: Tensor) -> tuple[Tensor, dict[str, int]]:
    """The logits, copied if rows do not start where vectors do; and how to walk over them, by dtype and vocab_size."""
    vector = 16 // logits.element_size()
    if logits.shape[1] % vector:
        vector = 1
    elif logits.data_ptr() % 16 or logits.stride(0) % vector:
        logits = logits.clone(memory_format=torch.contiguous_format)
    tiles = min(ELEMENTS_PER_THREAD // vector, triton.next_power_of_2(triton.cdiv(logits.shape[1], LANES * vector)))
    return logits, {"TILES": tiles, "LANES": LANES, "VECTOR": vector}


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition_penalty: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    prompt_ids: Tensor | None,
    output_ids: Tensor | None,
    seed: Tensor,
    position: Tensor,
    min_p_first: bool,
    return_logprobs: bool,
    num_logprobs: int,
    logit_bias: Tensor | None = None,
    mask: Tensor | None = None,
    typical_p: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, vocab_size = logits.shape
    raw, tiles = _tiles(logits)
    ids = torch.empty(batch, dtype=torch.int64, device=raw.device)
    valid = torch.empty(batch, dtype=torch.bool, device=raw.device)
    logprobs = torch.empty(batch if return_logprobs else 0, dtype=torch.float32, device=raw.device)
    processed = torch.empty_like(logprobs)
    top = (batch, num_logprobs) if num_logprobs else (0,)
    top_ids = torch.empty(top, dtype=torch.int64, device=raw.device)
    top_logprobs = torch.empty(top, dtype=torch.float32, device=raw.device)
    if batch == 0:
        return ids, valid, logprobs, processed, top_ids, top_logprobs

    penalties = [
        None if s is None else s.contiguous() for s in (repetition_penalty, presence_penalty, frequency_penalty)
    ]
    settings = [None if s is None else s.contiguous() for s in (temperature, top_k, top_p, min_p, typical_p)]
    x = raw
    has_penalties = any(s is not None for s in penalties) and not (prompt_ids is None and output_ids is None)
    if has_penalties or logit_bias is not None or mask is not None:
        x = penalized(raw, penalties[0], penalties[1], penalties[2], prompt_ids, output_ids, logit_bias, mask)
    block = tiles["TILES"] * LANES * tiles["VECTOR"]
    _sample_kernel[(batch,)](
        x, None if x is raw else raw, *settings, *penalties, seed.contiguous(), position.contiguous(), ids, valid,
        logprobs if return_logprobs else None, processed, x.stride(0), raw.stride(0), vocab_size,
        MIN_P_FIRST=min_p_first, BLOCKS=triton.next_power_of_2(triton.cdiv(vocab_size, block)),
        **tiles, num_warps=NUM_WARPS,
    )  # fmt: skip
    if num_logprobs:
        gathered = torch.empty(top, dtype=torch.int64, device=raw.device)
        top_kernel[(batch,)](
            raw, valid, gathered, top_ids, top_logprobs, raw.stride(0), vocab_size, num_logprobs,
            **tiles, num_warps=NUM_WARPS,
        )  # fmt: skip
    return ids, valid, logprobs, processed, top_ids, top_logprobs
