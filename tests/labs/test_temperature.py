"""The temperature lab: what it computes against outside facts, and what it claims at small size."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from fastlm.labs import temperature
from fastlm.labs.temperature_measures import chance_of_counts, entropy, perplexity, repetition, same_logits
from tests.labs.conftest import failed


def test_two_rows_of_one_softmax_are_recovered():
    logits = 0.3 * torch.randn(5, dtype=torch.float64)
    ratio = random.uniform(2, 10)
    fit = same_logits(logits.softmax(0).tolist(), (ratio * logits).softmax(0).tolist())
    assert fit.deviation < 0.5
    assert fit.ratio == pytest.approx(ratio, rel=0.03)
    torch.testing.assert_close(fit.logits, logits - logits.mean(), rtol=0.03, atol=0.01)


def test_no_random_logits_are_nearer_than_those_found():
    flat, sharp = (np.array(row) / sum(row) for row in (temperature.FLAT, temperature.SHARP))
    fit = same_logits(flat, sharp)

    def divergence(logits: np.ndarray, ratio: float) -> float:
        a, b = (np.exp(x) / np.exp(x).sum() for x in (logits, logits * ratio))
        return stats.entropy(flat, a) + stats.entropy(sharp, b)

    best = divergence(fit.logits.numpy(), fit.ratio)
    for _ in range(300):
        near = fit.logits.numpy() + np.random.default_rng().normal(0, 0.01, 4)
        assert divergence(near, fit.ratio * random.uniform(0.9, 1.1)) > best - 1e-6


def test_chi_square_equals_scipys():
    expected = torch.rand(6, dtype=torch.float64) + 0.1
    observed = torch.multinomial(expected, 500, replacement=True).bincount(minlength=6)
    wanted = (expected / expected.sum() * 500).numpy()
    assert chance_of_counts(observed, expected) == pytest.approx(
        stats.chisquare(observed.numpy(), wanted).pvalue, rel=1e-5
    )


def test_entropy_equals_scipys_and_grows_with_temperature():
    logits = torch.randn(3, 50)
    for T in (0.3, 1.0, 2.0):
        wanted = stats.entropy((logits / T).softmax(-1).numpy(), axis=-1)
        np.testing.assert_allclose(entropy(logits, T).numpy(), wanted, rtol=1e-4)
    assert (entropy(logits, 0.0) == 0).all()


def test_repetition_and_perplexity():
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(5 / 9)  # 9 runs of four, 4 of them new
    assert perplexity([math.log(1 / 8)] * 5) == pytest.approx(8)


def test_claims_that_need_no_model_hold(run):
    result = run("temperature", lang="en")
    assert len(result.findings) == 2
    assert failed(result) == []
    assert len(result.missing) == 2  # both parts that ask the model say so
    assert all("no-model" in line for line in result.missing)
    assert 1 < result.numbers["notes"]["ratio"] < 100


@pytest.mark.slow
def test_claims_about_gemma_hold(run, gemma, shared_data):
    if shared_data is None:
        pytest.skip("the sentences of ko-en are not there")
    result = run("temperature", model=gemma)
    assert failed(result) == []
    assert result.missing == []
    assert len(result.pictures) == 2
