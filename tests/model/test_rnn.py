from __future__ import annotations

import pytest
import torch

from fastlm.errors import ConfigError
from fastlm.model import RNNConfig, RNNLanguageModel


@pytest.fixture(params=["rnn", "lstm", "gru"])
def model(request: pytest.FixtureRequest) -> RNNLanguageModel:
    return RNNLanguageModel(RNNConfig(50, 24, 2, 16, request.param))


def test_logits_with_state_carried_equal_those_of_the_whole_sequence(model: RNNLanguageModel) -> None:
    ids = torch.randint(50, (3, 30))
    with torch.no_grad():
        whole = model(ids)
        cache = model.new_cache(3)
        parts = [model(ids[:, :4], cache)] + [model(ids[:, i : i + 1], cache) for i in range(4, 30)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.lengths.tolist() == [30, 30, 30]


def test_a_row_of_the_state_can_be_read_into_alone(model: RNNLanguageModel) -> None:
    a, b = torch.randint(50, (1, 5)), torch.randint(50, (1, 9))
    with torch.no_grad():
        cache = model.new_cache(2)
        model(a, cache.row(0))
        model(b, cache.row(1))
        new = torch.randint(50, (2, 1))
        logits = model(new, cache)[:, -1]
        torch.testing.assert_close(logits[0], model(torch.cat([a, new[:1]], 1))[0, -1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[1], model(torch.cat([b, new[1:]], 1))[0, -1], rtol=1e-4, atol=1e-5)


def test_loss_equals_cross_entropy_of_the_logits(model: RNNLanguageModel) -> None:
    ids = torch.randint(50, (3, 17))
    expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model.loss(ids[:, :-1], ids[:, 1:]), expected)


def test_one_batch_is_learned_by_heart(model: RNNLanguageModel) -> None:
    ids = torch.randint(50, (2, 13))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(300):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


def test_an_unknown_cell_is_refused() -> None:
    with pytest.raises(ConfigError, match="lstm, gru"):
        RNNConfig(50, 24, 2, 16, "elman")
