"""Locally typical sampling (Meister et al. 2023) in Triton: a threshold on how near surprise is to the entropy.

With s = (x - max) / temperature, Z the sum of exp(s) over the tokens that earlier filters left, and c the mean of s
under exp(s) / Z, a token's surprise is log Z - s and the entropy log Z - c. They are |s - c| apart, and no logarithm is
needed. One pass gives Z and c. The rest is top_p's search (`triton_search.search`) among keys of -|s - c| instead of
the logits', for the nearest tokens that hold typical_p of Z: some nine passes where very many are alike.
The draw then keeps what is not below that key.

The distance is fp32: s has the bits of the definition's, and c the digits of fp64 in two floats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlm.ops.sampling.triton_search import load_tile, nearness_key, scaled_logits, search, to_key, weigh

LEAST_WEIGHT = tl.constexpr(2.0**-126)  # that is not 0


@triton.jit
def kept_weights(x, threshold, max_logit, scale, min_p, MIN_P: tl.constexpr, near, nearest):
    """Weights of logits, 0 where a filter drops the token; with `near`, also where its nearness is below `nearest`."""
    weights = weigh(x, max_logit, scale, min_p, MIN_P)
    weights = tl.where(to_key(x) >= threshold, weights, 0.0)
    if near is not None:
        weights = tl.where(nearness_key(x, max_logit, near) >= nearest, weights, 0.0)
    return weights


@triton.jit
def typical(
    row_ptr, vocab_size, lowest, typical_p, max_logit, temperature, scale, min_p,
    MIN_P: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """c, what c lacks in fp32, and the least key of nearness that is kept, of tokens with keys not below `lowest`."""
    masses = tl.zeros((LANES,), tl.float32)
    moments = tl.zeros((LANES,), tl.float32)
    least = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab_size, TILES * LANES * VECTOR):
        for t in tl.static_range(TILES):
            x = load_tile(row_ptr, start + t * LANES * VECTOR, vocab_size, LANES, VECTOR)
            weights = kept_weights(x, lowest, max_logit, scale, min_p, MIN_P, None, None)
            scaled = tl.where(weights > 0, scaled_logits(x, max_logit, temperature), 0.0)
            masses += tl.sum(weights, 1)
            moments += tl.sum(weights * scaled, 1)
            least = tl.minimum(least, tl.min(scaled, 1))
    mass = tl.sum(masses.to(tl.float64))
    exact = tl.sum(moments.to(tl.float64)) / mass
    center = exact.to(tl.float32)
    rest = (exact - center.to(tl.float64)).to(tl.float32)

    furthest = tl.maximum(-center, center - tl.min(least))
    low = to_key(-1.001 * furthest)
    goal = tl.maximum(typical_p.to(tl.float64) * mass, LEAST_WEIGHT)  # of a typical_p of 0, the nearest token
    nearest, _, _, _ = search(
        row_ptr, vocab_size, low, low * 0 + 1, goal, max_logit, scale, min_p,
        True, True, MIN_P, TILES, LANES, VECTOR, (temperature, center, rest), lowest,
    )  # fmt: skip
    return center, rest, nearest
