"""What the temperature lab computes: two rows from the same logits, whether draws fit a row, how a text repeats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.inference import Completion
from fastlm.labs.statistics import Spread, distinct_n, spread


class SameLogits(NamedTuple):
    """`flat` and `sharp`, in percent, are softmax(logits) and softmax(logits · ratio)."""

    logits: Tensor
    ratio: float  # of the flat row's temperature to the sharp one's
    flat: Tensor
    sharp: Tensor
    deviation: float  # from the rows that were wanted, the largest, in percentage points


def same_logits(flat: Sequence[float], sharp: Sequence[float]) -> SameLogits:
    """The logits and the ratio of temperatures (1 to 100) that give two rows, scaled to 100 %, as nearly as can be.

    Nearest is where the sum of both Kullback-Leibler divergences is smallest: for each ratio it is convex in the
    logits, so that Newton's method finds it.
    """
    p, q = (torch.tensor(row, dtype=torch.float64) / sum(row) for row in (flat, sharp))
    ratios = torch.logspace(0, 2, 201, dtype=torch.float64)[:, None]
    logits = p.log().expand(len(ratios), -1)
    for _ in range(50):
        a, b = logits.softmax(1), (ratios * logits).softmax(1)
        slope = a - p + ratios * (b - q)
        curvature = _covariance(a) + ratios[..., None] ** 2 * _covariance(b) + 1e-9 * torch.eye(len(p))
        step = torch.linalg.solve(curvature, slope)
        logits = logits - step / (ratios * step.abs().amax(1, keepdim=True)).clamp(min=1)
    divergence = -(p * logits.log_softmax(1) + q * (ratios * logits).log_softmax(1)).sum(1)
    best = divergence.argmin()
    a, b = logits[best].softmax(0), (ratios[best] * logits[best]).softmax(0)
    deviation = 100 * float(torch.maximum((a - p).abs().max(), (b - q).abs().max()))
    return SameLogits(logits[best] - logits[best].mean(), float(ratios[best]), 100 * a, 100 * b, deviation)


def _covariance(p: Tensor) -> Tensor:
    """Of a draw from each row of `p`, as an indicator vector: the second derivative of log-sum-exp."""
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def chance_of_counts(observed: Tensor, expected: Tensor) -> float:
    """Probability of counts as far from `expected` shares as `observed` or farther: Pearson's chi-square test."""
    wanted = expected.double() / expected.sum() * observed.sum()
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    degrees = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Of softmax(logits / temperature), in nats; `(..., vocab_size)` -> `(...)`. 0 at temperature 0."""
    if temperature == 0:
        return torch.zeros(logits.shape[:-1])
    logs = (logits / temperature).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that stood earlier in the same text (seq-rep-n of Welleck et al. 2020)."""
    return 1 - distinct_n([ids], n)


class Measured(NamedTuple):
    """Texts written at one temperature, over seeds."""

    distinct: Spread
    repetition: Spread
    perplexity: Spread  # of the model's own texts, under the model at temperature 1


def measure(of_seeds: list[list[Completion]]) -> Measured:
    ids = [[c.token_ids for c in texts] for texts in of_seeds]
    logprobs = [[entry.logprob for c in texts for entry in c.logprobs or []] for texts in of_seeds]
    return Measured(
        spread([distinct_n(texts, 2) for texts in ids]),
        spread([sum(map(repetition, texts)) / len(texts) for texts in ids]),
        spread([perplexity(each) for each in logprobs]),
    )


def perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))
