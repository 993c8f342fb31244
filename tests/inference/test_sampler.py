"""Rows of one batch, each with the settings of its own sequence."""

from __future__ import annotations

import pytest
import torch

from fastlm.inference import SamplingParams, sampler
from fastlm.inference.sampler import Row
from fastlm.inference.sequence import Sequence
from fastlm.ops.sampling import Sample


def row(params: SamplingParams, seed: int) -> Row:
    return Row(Sequence(seed, 0, [1, 2, 3], params, seed=seed), [])


def test_rows_beside_one_with_typical_p_keep_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call draws them all, and what it gives for the others is what a call without typical_p gives, to the bit."""
    taken: list[Sample] = []
    op = sampler.sample

    def sample(*args: object, **kwargs: object) -> Sample:
        taken.append(op(*args, **kwargs, return_logprobs=True))
        return taken[-1]

    monkeypatch.setattr(sampler, "sample", sample)
    logits = torch.randn(40, 3000) * 3
    plain = [SamplingParams(temperature=0.7 + 0.05 * (i % 5), top_p=0.95, top_k=900 - i) for i in range(40)]
    mixed = [SamplingParams(temperature=0.7, typical_p=0.6) if i % 4 == 0 else p for i, p in enumerate(plain)]
    drawn = [sampler.draw(logits, [row(p, i) for i, p in enumerate(rows)], None) for rows in (plain, mixed)]
    without, beside = taken
    kept = [i for i in range(40) if i % 4]
    assert [drawn[0][i].token for i in kept] == [drawn[1][i].token for i in kept]
    for a, b in zip(without[:4], beside[:4], strict=True):
        assert torch.equal(a[kept], b[kept])
    typical = [i for i in range(40) if i % 4 == 0]
    alone = [sampler.draw(logits[[i]], [row(mixed[i], i)], None)[0].token for i in typical]
    assert alone == [drawn[1][i].token for i in typical]
    for i, out in zip(typical, taken[2:], strict=True):
        assert torch.equal(out.processed_logprobs[0], beside.processed_logprobs[i])
