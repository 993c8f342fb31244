"""The next-token lab: what it measures against outside facts, and what it claims at small size."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from scipy import stats

from fastlm.labs import next_token
from fastlm.labs.next_token_measures import Ngrams, divergence, perplexity
from fastlm.labs.workbench import Workbench
from fastlm.model import load_model
from fastlm.training import TrainingConfig, train
from fastlm.training.config import Preset, transformer_config
from tests.labs.conftest import failed


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, shared_data) -> None:
    if shared_data is None:
        pytest.skip("the texts of nsmc are not there")
    monkeypatch.setattr(next_token, "DOCUMENTS", 2500)
    monkeypatch.setattr(next_token, "VOCAB_SIZE", 384)
    monkeypatch.setattr(next_token, "MODEL", Preset(64, 2, 32, context_length=32, batch_size=16))
    monkeypatch.setattr(next_token, "MOMENTS", (0, 5, 10, 20, 40, 250))
    monkeypatch.setattr(next_token, "READ_WINDOWS", 32)
    monkeypatch.setattr(Workbench, "seeds", lambda lab: [0])


def test_ngrams_are_counts():
    ids = torch.randint(0, 6, (200,))
    counts = Ngrams(ids, 7)  # the last token never occurs
    torch.testing.assert_close(counts.unigram.sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(counts.bigram.sum(1), torch.ones(7, dtype=torch.float64))
    pairs = Counter(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    first, second = max(pairs, key=pairs.__getitem__)
    after = [b for (a, b) in pairs if a == first]
    total = sum(n for (a, _), n in pairs.items() if a == first)
    share = (ids == second).sum().item() + 1
    wanted = (pairs[first, second] + len(after) * share / 207) / (total + len(after))
    assert counts.bigram[first, second].item() == pytest.approx(wanted)


def test_perplexity_and_divergence():
    assert perplexity(torch.full((9,), 1 / 50, dtype=torch.float64)) == pytest.approx(50)
    p, q = (torch.rand(4, 9, dtype=torch.float64) + 0.01 for _ in range(2))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    assert divergence(p, q) == pytest.approx(stats.entropy(p.numpy(), q.numpy(), axis=1).mean())


def test_stopping_at_moments_does_not_change_the_run(small, monkeypatch, tmp_path, shared_data):
    monkeypatch.setattr(next_token, "MOMENTS", (0, 5, 30))
    lab = Workbench(tmp_path, data=shared_data)
    dataset = next_token._text(lab)
    *_, (step, stopped) = next_token.moments(lab, dataset, 1)
    config = TrainingConfig(
        steps=step, batch_size=16, learning_rate=0.02, embedding_learning_rate=0.004, evaluations=0, seed=1
    )
    train(transformer_config(384, next_token.MODEL), config, dataset, tmp_path / "at once")
    for name, tensor in load_model(tmp_path / "at once").state_dict().items():
        assert torch.equal(tensor, stopped.state_dict()[name]), name


def test_claims_hold(run, small):
    result = run("next-token")
    assert failed(result) == []
    assert len(result.findings) == 3
    assert len(result.pictures) == 2
    last = result.numbers["readings"][250][0]
    assert last["entropy"] < math.log(384)


def test_without_data_the_lab_says_where_it_is_had(run, tmp_path):
    result = run("next-token", data=tmp_path)
    assert "github.com/e9t/nsmc" in result.missing[0]
