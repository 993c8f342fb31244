"""What the sampling kernels share: how a row is walked over, and the search for the threshold that a filter sets.

A row is walked over in tiles of (LANES, VECTOR) elements, TILES of them at a time: a thread owns one lane and loads
VECTOR neighbours, 16 bytes, so that sums over a lane stay inside a thread and a pass over a row synchronises only at
its end. Logits are compared as integers in the same order, so that a threshold can be narrowed to one value exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY_KEY = tl.constexpr(0x7F800000)  # key of +inf; that of -inf is its negative
PIVOTS = tl.constexpr(6)  # thresholds measured in one pass, which then takes a little longer than the memory needs
LINEAR_PASSES = tl.constexpr(4)  # pivots evenly spaced by value, then by key, which ends whatever the logits are
WEIGHT_ONE = tl.constexpr(-(2.0**-54))  # from here up, exp is 1 in fp64


@triton.jit
def append(items, item):
    return items + (item,)  # noqa: RUF005  (Triton has no unpacking)


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
def load_tile(row_ptr, start, vocab_size, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Logits from `start` on, fp32, (LANES, VECTOR); -inf beyond the row."""
    ids = start + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    limit = vocab_size // VECTOR * VECTOR  # the same number; the compiler sees that a vector is inside or outside
    return tl.load(row_ptr + ids, ids < limit, float("-inf")).to(tl.float32)


@triton.jit
def add_online(highest, total, x, scale):
    """Running maximum and sum of exp2((x - maximum) · scale) of each lane, with another tile taken in."""
    new = tl.maximum(highest, tl.max(x, 1))
    weights = tl.exp2((x - new[:, None]) * scale)
    return new, total * tl.exp2((highest - new) * scale) + tl.sum(weights, 1)


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
def scaled_logits(x, max_logit, temperature):
    """(x - max_logit) / temperature, rounded as the definition does it; 0 for all whose weight is 1 there."""
    scaled = tl.div_rn(x - max_logit, tl.broadcast_to(temperature, x.shape))
    return tl.where(scaled >= WEIGHT_ONE, 0.0, scaled)


@triton.jit
def nearness_key(x, max_logit, near):
    """The key of -|s - c|, s being the scaled logit; `near` is (temperature, c, what c lacks in fp32)."""
    return to_key(-tl.abs((scaled_logits(x, max_logit, near[0]) - near[1]) - near[2]))


@triton.jit
def between(low, high, part, parts):
    """low + (high - low) · part / parts, without the overflow of keys far apart."""
    wide = low.to(tl.int64)
    return (wide + (high.to(tl.int64) - wide) * part // parts).to(tl.int32)


@triton.jit
def largest_bound(largest, weights, goal, low, high, BY_MASS: tl.constexpr, TILES: tl.constexpr):
    """The largest key in [low, high) at which the largest logits of the tiles' positions alone reach `goal`, else low.

    A row's top k rarely share a position, so this is nearly always the threshold itself, and never above it.
    """
    while low + 1 < high:
        middle = between(low, high, 1, 2)
        if BY_MASS:
            reached = tl.full((), 0.0, tl.float64)
        else:
            reached = tl.full((), 0, tl.int32)
        for i in tl.static_range(TILES):
            hit = largest[i] >= middle
            if BY_MASS:
                reached += tl.sum(tl.sum(tl.where(hit, weights[i], 0.0), 1).to(tl.float64))
            else:
                reached += tl.sum(tl.sum(hit.to(tl.int32), 1))
        enough = reached >= goal
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
        by_value = to_key(to_value(low) * (1 - part) + to_value(high - 1) * part)
        by_key = between(low, high, i - 1, PIVOTS - 1)
        key = tl.maximum(tl.where(step < LINEAR_PASSES, by_value, by_key), low + 1)
    return tl.maximum(tl.minimum(key, high - 1), low)


@triton.jit
def search(
    row_ptr, vocab_size, low, high, goal, max_logit, scale, floor,
    BY_MASS: tl.constexpr, MASSES: tl.constexpr, FLOOR: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, near=None, lowest=None,
):  # fmt: skip
    """The highest threshold in [low, high) above or at which the row still holds `goal`, of tokens or of mass.

    With `near`, which needs MASSES, keys are those of nearness, of the tokens whose weight is not 0 and whose logit's
    key is not below `lowest`.

    Holds low <= threshold < high. One pass measures PIVOTS thresholds at once. It ends when one distinct
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
            pivots = append(pivots, pivot(low, high, step, i))
            counts = append(counts, tl.zeros((LANES,), tl.int32))
            masses = append(masses, tl.zeros((LANES,), tl.float32))
        least = tl.full((LANES,), INFINITY_KEY, tl.int32)
        for start in range(0, vocab_size, TILES * LANES * VECTOR):
            for t in tl.static_range(TILES):
                x = load_tile(row_ptr, start + t * LANES * VECTOR, vocab_size, LANES, VECTOR)
                keys = to_key(x)
                if MASSES:
                    weights = weigh(x, max_logit, scale, floor, FLOOR)
                if near is not None:
                    is_left = (keys >= lowest) & (weights > 0)
                    keys = tl.where(is_left, nearness_key(x, max_logit, near), -INFINITY_KEY)
                least = tl.minimum(least, tl.min(tl.where(keys >= low, keys, INFINITY_KEY), 1))
                new_counts = ()
                new_masses = ()
                for i in tl.static_range(PIVOTS):
                    hit = keys >= pivots[i]
                    new_counts = append(new_counts, counts[i] + tl.sum(hit.to(tl.int32), 1))
                    if MASSES:
                        new_masses = append(new_masses, masses[i] + tl.sum(tl.where(hit, weights, 0.0), 1))
                    else:
                        new_masses = append(new_masses, masses[i])
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
        low = tl.maximum(new_low, tl.min(least))
        high = new_high
        is_open = (low + 1 < high) & (count_low - count_high > 1)
        if not BY_MASS:
            is_open = is_open & (count_low > goal)
        step += 1
    return low, high, count_high, mass_low
