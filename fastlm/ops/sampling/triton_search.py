"""What the sampling kernels share: how a row is walked over, and the search for the threshold that a filter sets.

A tile is (ROUNDS, LANES, VECTOR) elements: a thread owns one lane and loads VECTOR neighbours (16 bytes) ROUNDS times,
so sums over the first and last dimension stay inside a thread, and a pass over a row synchronises only at its end.
Logits are compared as integers in the same order, so that a threshold can be narrowed down to one value exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY_KEY = tl.constexpr(0x7F800000)  # key of +inf; that of -inf is its negative
PIVOTS = tl.constexpr(8)  # thresholds measured in one pass: 5 instructions an element each, about a pass of memory
LINEAR_PASSES = tl.constexpr(4)  # pivots evenly spaced by value, then by key, which ends whatever the logits are


@triton.jit
def to_key(x):
    """The integer whose order is that of the floats; both zeros give 0, NaNs lie beyond the infinities."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & MAGNITUDE), bits)


@triton.jit
def to_value(key):
    bits = tl.where(key < 0, (-key) | (-MAGNITUDE - 1), key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_tile(row_ptr, start, vocab_size, ROUNDS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Logits from `start` on as fp32, -inf beyond the row."""
    round_ids = tl.arange(0, ROUNDS)[:, None, None] * (LANES * VECTOR)
    ids = start + round_ids + tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    limit = vocab_size // VECTOR * VECTOR  # the same number; the compiler sees that a vector is inside or outside
    return tl.load(row_ptr + ids, ids < limit, float("-inf")).to(tl.float32)


@triton.jit
def in_lane(tile):
    """Sums of each lane, (LANES,)."""
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def add_online(highest, total, x, scale):
    """Running maximum and sum of exp2((x - maximum) · scale) of each lane, with another tile taken in."""
    new = tl.maximum(highest, tl.max(tl.max(x, 2), 0))
    weights = tl.exp2((x - new[None, :, None]) * scale)
    return new, total * tl.exp2((highest - new) * scale) + in_lane(weights)


@triton.jit
def online_total(highest, total, max_logit, scale):
    """The lanes' sums brought to one maximum and added up, fp64."""
    return tl.sum((total * tl.exp2((highest - max_logit) * scale)).to(tl.float64))


@triton.jit
def weigh(x, max_logit, scale, floor, FLOOR: tl.constexpr):
    """exp((x - max_logit) / temperature); with FLOOR zero where below `floor`."""
    weights = tl.exp2((x - max_logit) * scale)
    if FLOOR:
        weights = tl.where(weights >= floor, weights, 0.0)
    return weights


@triton.jit
def lanes_bound(lanes, weights, goal, low, high, BY_MASS: tl.constexpr):
    """The largest key in [low, high) at which the largest logits of the tile's positions alone reach `goal`, else low.

    A row's top k rarely share a position, so this is nearly always the threshold itself, and never above it.
    """
    while high - low > 1:
        middle = low + (high - low) // 2
        hit = lanes >= middle.to(tl.int32)
        if BY_MASS:
            enough = tl.sum(in_lane(tl.where(hit, weights, 0.0)).to(tl.float64)) >= goal
        else:
            enough = tl.sum(in_lane(hit.to(tl.int32))) >= goal
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def pivot(low, high, step, i: tl.constexpr):
    """The i-th of PIVOTS keys in [low, high): the lowest, the next, and cuts of the rest into equal parts."""
    if i == 0:
        key = low
    elif i == 1:
        key = low + 1
    else:
        part: tl.constexpr = (i - 1) / (PIVOTS - 1)
        lowest, highest = to_value(low.to(tl.int32)), to_value((high - 1).to(tl.int32))
        by_value = to_key(lowest * (1 - part) + highest * part).to(tl.int64)
        by_key = low + (high - low) * (i - 1) // (PIVOTS - 1)
        key = tl.maximum(tl.where(step < LINEAR_PASSES, by_value, by_key), low + 1)
    return tl.maximum(tl.minimum(key, high - 1), low)


@triton.jit
def search(
    row_ptr, vocab_size, low, high, goal, max_logit, scale, floor,
    BY_MASS: tl.constexpr, MASSES: tl.constexpr, FLOOR: tl.constexpr,
    ROUNDS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The highest threshold in [low, high) above or at which the row still holds `goal`, of tokens or of mass.

    Holds low <= threshold < high, both int64. One pass measures PIVOTS thresholds at once. It ends when one distinct
    logit is left between the bounds or, counting, when exactly `goal` tokens lie at or above the lower.

    Returns low, high, the number of tokens at or above high, and the mass at or above low (fp64; 0 without MASSES).
    """
    is_open = low < high
    step = 0
    count_low = vocab_size
    count_high = 0
    mass_low = tl.full((), 0.0, tl.float64)
    while is_open:
        pivots = ()
        counts = ()
        masses = ()
        for i in tl.static_range(PIVOTS):
            pivots = pivots + (pivot(low, high, step, i),)  # noqa: RUF005  (Triton has no unpacking)
            counts = counts + (tl.zeros((LANES,), tl.int32),)  # noqa: RUF005
            masses = masses + (tl.zeros((LANES,), tl.float32),)  # noqa: RUF005
        least = tl.full((LANES,), INFINITY_KEY, tl.int32)
        for start in range(0, vocab_size, ROUNDS * LANES * VECTOR):
            x = load_tile(row_ptr, start, vocab_size, ROUNDS, LANES, VECTOR)
            keys = to_key(x)
            if MASSES:
                weights = weigh(x, max_logit, scale, floor, FLOOR)
            above = tl.where(keys >= low.to(tl.int32), keys, INFINITY_KEY)
            least = tl.minimum(least, tl.min(tl.min(above, 2), 0))
            new_counts = ()
            new_masses = ()
            for i in tl.static_range(PIVOTS):
                hit = keys >= pivots[i].to(tl.int32)
                new_counts = new_counts + (counts[i] + in_lane(hit.to(tl.int32)),)  # noqa: RUF005
                if MASSES:
                    new_masses = new_masses + (masses[i] + in_lane(tl.where(hit, weights, 0.0)),)  # noqa: RUF005
                else:
                    new_masses = new_masses + (masses[i],)  # noqa: RUF005
            counts = new_counts
            masses = new_masses
        new_low = low
        new_high = high
        for i in tl.static_range(PIVOTS):
            count = tl.sum(counts[i])
            mass = tl.sum(masses[i].to(tl.float64))
            if BY_MASS:
                enough = mass >= goal
            else:
                enough = count >= goal
            if i == 0 or enough:
                new_low = pivots[i]
                count_low = count
                mass_low = mass
            if not enough and pivots[i] < new_high:
                new_high = pivots[i]
                count_high = count
        low = tl.maximum(new_low, tl.min(least).to(tl.int64))
        high = new_high
        is_open = (high - low > 1) & (count_low - count_high > 1)
        if not BY_MASS:
            is_open = is_open & (count_low > goal)
        step += 1
    return low, high, count_high, mass_low
