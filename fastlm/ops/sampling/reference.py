"""The definition of sampling, in plain torch: weights in fp64, one sort, nothing fused."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def supports(*args: object, **kwargs: object) -> str | None:
    return None


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
    raw = logits.float()
    x = adjusted(raw, logit_bias, mask)
    x = penalized(x, repetition_penalty, presence_penalty, frequency_penalty, prompt_ids, output_ids)
    max_logit = x.amax(1)
    valid = ~x.isnan().any(1) & max_logit.isfinite() & _in_range(temperature, 0.0)
    for setting, low in ((top_k, 0), (top_p, 0.0), (min_p, 0.0), (typical_p, 0.0), (repetition_penalty, 1e-45)):
        if setting is not None:
            valid &= _in_range(setting, low)
    for setting in (presence_penalty, frequency_penalty):
        if setting is not None:
            valid &= setting.isfinite()
    if min_p is not None:
        valid &= min_p <= 1

    x = torch.where(valid[:, None], x, torch.zeros_like(x))
    greedy = valid & (temperature == 0)
    divisor = torch.where(valid & ~greedy, temperature, torch.ones_like(temperature))
    kept, weights = filtered(x, divisor, top_k, top_p, min_p, min_p_first)
    if typical_p is not None:
        kept &= typical(weights * kept, typical_p)
    ids = inverse_cdf(weights * kept, uniform(seed, position))
    ids = torch.where(greedy, x.argmax(1), ids)
    ids = torch.where(valid, ids, torch.zeros_like(ids))

    nan = torch.tensor(torch.nan, dtype=torch.float32, device=logits.device)
    processed = raw.new_empty(0)
    if return_logprobs:
        share = _at(weights, ids) / (weights * kept).sum(1)
        processed = torch.where(valid, torch.where(greedy, 0.0, share.log()).float(), nan)
    logprobs, top_ids, top_logprobs = raw_logprobs(raw, ids, valid, return_logprobs, num_logprobs)
    return ids, valid, logprobs, processed, top_ids, top_logprobs


def raw_logprobs(
    raw: Tensor, ids: Tensor, valid: Tensor, return_logprobs: bool, num_logprobs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, top_ids and top_logprobs of `Sample`, of fp32 logits as the model gave them."""
    nan = torch.tensor(torch.nan, dtype=torch.float32, device=raw.device)
    logprobs, top_ids, top_logprobs = raw.new_empty(0), ids.new_empty(0), raw.new_empty(0)
    if not return_logprobs and not num_logprobs:
        return logprobs, top_ids, top_logprobs
    distribution = raw.double().log_softmax(1)
    if return_logprobs:
        logprobs = torch.where(valid, _at(distribution, ids).float(), nan)
    if num_logprobs:
        order = raw.sort(dim=1, descending=True, stable=True).indices[:, :num_logprobs]
        top_ids = torch.where(valid[:, None], order, torch.zeros_like(order))
        top_logprobs = torch.where(valid[:, None], distribution.gather(1, order).float(), nan)
    return logprobs, top_ids, top_logprobs


def adjusted(x: Tensor, logit_bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """The logits `(batch, vocab_size)` with the bias added, and -inf where the mask's bit is 0."""
    if logit_bias is not None:
        x = x + logit_bias
    if mask is not None:
        tokens = torch.arange(x.shape[1], device=x.device)
        allowed = (mask[:, tokens // 32] >> (tokens % 32)) & 1
        x = torch.where(allowed == 1, x, -torch.inf)
    return x


def _in_range(setting: Tensor, low: float) -> Tensor:
    return (setting >= low) & setting.isfinite()


def _at(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(1, ids[:, None])[:, 0]


def penalized(
    x: Tensor,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    prompt_ids: Tensor | None,
    output_ids: Tensor | None,
) -> Tensor:
    """The logits `(batch, vocab_size)` after the three penalties."""
    seen_in_output = counts(output_ids, x)
    if repetition is not None:
        seen = (seen_in_output > 0) | (counts(prompt_ids, x) > 0)
        factor = repetition[:, None]
        x = torch.where(seen, torch.where(x > 0, x / factor, x * factor), x)
    if frequency is not None:
        x = torch.where(seen_in_output > 0, x - frequency[:, None] * seen_in_output, x)
    if presence is not None:
        x = torch.where(seen_in_output > 0, x - presence[:, None], x)
    return x


def counts(ids: Tensor | None, logits: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs in each row of `ids`; those outside it are padding."""
    batch, vocab_size = logits.shape
    result = torch.zeros(batch, vocab_size + 1, device=logits.device)
    if ids is not None:
        inside = (ids >= 0) & (ids < vocab_size)
        result.scatter_add_(1, torch.where(inside, ids, vocab_size), torch.ones_like(ids, dtype=torch.float32))
    return result[:, :vocab_size]


def filtered(
    x: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    min_p_first: bool,
) -> tuple[Tensor, Tensor]:
    """Which tokens stay, `(batch, vocab_size)` bool, and every token's weight, fp64, 1 for the largest."""
    scaled = (x - x.amax(1, keepdim=True)) / temperature[:, None]
    weights = scaled.double().exp()
    kept = torch.ones_like(x, dtype=torch.bool)
    values, order = x.sort(dim=1, descending=True)
    if top_k is not None:
        vocab_size = x.shape[1]
        k = torch.where(top_k > 0, top_k, vocab_size).clamp(1, vocab_size)
        kept &= x >= values.gather(1, k[:, None] - 1)
    if min_p is not None and min_p_first:
        kept &= weights >= min_p[:, None]
    if top_p is not None:
        shares = (weights * kept).gather(1, order)
        before = shares.cumsum(1) - shares
        starts = torch.ones_like(kept)
        starts[:, 1:] = values[:, 1:] != values[:, :-1]
        above = torch.where(starts, before, 0.0).cummax(1).values  # of equal logits, the first's
        total = shares.sum(1, keepdim=True)
        inside = (above < top_p.double()[:, None] * total) | (top_p[:, None] >= 1)
        inside[:, 0] = True
        lowest = torch.where(inside, values, torch.inf).amin(1, keepdim=True)
        kept &= x >= lowest
    if min_p is not None:
        kept &= weights >= min_p[:, None]
    return kept, weights


def typical(weights: Tensor, typical_p: Tensor) -> Tensor:
    """Which tokens `typical_p` keeps, `(batch, vocab_size)` bool, of weights that are 0 where others dropped them."""
    shares = weights / weights.sum(1, keepdim=True)
    surprise = -shares.log()
    entropy = torch.where(shares > 0, shares * surprise, 0.0).sum(1, keepdim=True)
    distance = (surprise - entropy).abs()
    order = distance.argsort(dim=1, stable=True)
    before = shares.gather(1, order).cumsum(1) - shares.gather(1, order)
    inside = before < typical_p.double()[:, None]
    inside[:, 0] = True
    furthest = torch.where(inside, distance.gather(1, order), -torch.inf).amax(1, keepdim=True)
    return (shares > 0) & ((distance <= furthest) | (typical_p[:, None] >= 1))


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """The first id at which the running sum of weights exceeds u · their sum."""
    running = weights.cumsum(1)
    exceeds = running > (u * running[:, -1])[:, None]
    return exceeds.to(torch.uint8).argmax(1)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """u in [0, 1) with 53 random bits, fp64, by Philox4x32-10."""
    zero = torch.zeros_like(position)
    words = philox([position & WORD, (position >> 32) & WORD, zero, zero], [seed & WORD, (seed >> 32) & WORD])
    return ((words[0] << 21) | (words[1] >> 11)).double() * 2.0**-53


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 of Salmon et al. 2011: four random words of a counter of four and a key of two, as int64."""
    for _ in range(10):
        # A product of two 32-bit words wraps in int64, which its masked halves do not show.
        product0, product1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        high0, high1 = (product0 >> 32) & WORD, (product1 >> 32) & WORD
        counter = [high1 ^ counter[1] ^ key[0], product1 & WORD, high0 ^ counter[3] ^ key[1], product0 & WORD]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return counter
