from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastlm.errors import DataError
from fastlm.model import ModelConfig, Transformer
from fastlm.training import evaluate
from fastlm.training.data import TokenSplit
from fastlm.training.evaluate import windows


@pytest.mark.parametrize("context", [1, 2, 3, 16, 17])
@pytest.mark.parametrize("tokens", [2, 3, 16, 17, 18, 33, 100, 1000])
def test_every_token_is_scored_once_with_half_a_context_before_it(tokens: int, context: int) -> None:
    scored: list[int] = []
    for window in windows(tokens, context):
        assert window.end - window.start <= context
        scored += range(window.score_from + 1, window.end + 1)
        if window.score_from:
            assert window.score_from - window.start >= context - max(1, context // 2)
        else:
            assert window.start == 0
    assert scored == list(range(1, tokens))


def model(context: int = 16) -> Transformer:
    result = Transformer(ModelConfig(50, 16, 1, 2, 2, 8, 32, context))
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.normal_(std=0.3)
    return result.eval()


def split(tokens: int, num_bytes: int) -> TokenSplit:
    ids = np.random.default_rng().integers(1, 50, tokens).astype(np.uint16)
    ids[0] = ids[tokens // 2] = 0
    return TokenSplit([ids], num_bytes)


def test_bits_per_byte_is_the_sum_over_tokens_scored_one_window_at_a_time() -> None:
    m, data = model(), split(101, 333)
    ids = torch.from_numpy(data.read(0, 101))
    nats = 0.0
    with torch.no_grad():
        for window in windows(101, 16):
            logits = m(ids[None, window.start : window.end])[0].double().log_softmax(-1)
            for i in range(window.score_from, window.end):
                if ids[i + 1] != 0:
                    nats -= logits[i - window.start, ids[i + 1]].item()
    result = evaluate(m, data, 0)
    assert result is not None
    assert result.tokens == 99
    assert not result.partial
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 333, rel=1e-5)
    assert result.loss == pytest.approx(nats / 99, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / 99), rel=1e-4)


def test_a_partial_evaluation_scores_fewer_tokens_and_estimates_the_same_figure() -> None:
    m, data = model(), split(5000, 12_000)
    whole, part = evaluate(m, data, 0), evaluate(m, data, 0, max_windows=100)
    assert whole is not None
    assert part is not None
    assert part.partial
    assert part.tokens < whole.tokens / 5
    assert part.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=0.1)


def test_evaluation_does_not_change_the_model_or_its_mode() -> None:
    m = model().train()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    evaluate(m, split(60, 100), 0)
    assert m.training
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_stopping_gives_none_and_no_text_is_an_error() -> None:
    assert evaluate(model(), split(60, 100), 0, should_stop=lambda: True) is None
    with pytest.raises(DataError, match="no text to score"):
        evaluate(model(), TokenSplit([np.zeros(5, dtype=np.uint16)], 0), 0)
