from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastlm.model import ModelConfig, RNNConfig, Transformer, build_model
from fastlm.model.checkpoint import LanguageModel
from fastlm.tokenizer import BpeTrainer, Tokenizer

CONTEXT = 64  # tokens, of `paged` and `llama`
TEXT = "이 영화는 정말 재미있었다. The film was good, 음악도 좋았다! 🎬\n" * 30


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return BpeTrainer(300).train_from_iterator([TEXT])


def random_model(config: ModelConfig | RNNConfig) -> LanguageModel:
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["transformer", "lstm", "gru"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> LanguageModel:
    if request.param == "transformer":
        return random_model(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, 64, qk_norm=True))
    return random_model(RNNConfig(tokenizer.vocab_size, 24, 1, 64, request.param))


@pytest.fixture
def transformer(tokenizer: Tokenizer) -> LanguageModel:
    return random_model(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, 16))


@pytest.fixture(scope="module", params=["llama", "gemma"])
def paged(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Transformer:
    """With and without what the cache must be told of a layer: window, softcap and scale."""
    settings = {"qk_norm": True}
    if request.param == "gemma":
        settings |= {"sliding_window": 9, "full_attention_layers": (1,), "rope_local_theta": 100.0}
        settings |= {"attention_softcap": 2.0, "query_pre_attn_scalar": 5.0, "logit_softcap": 9.0}
    model = random_model(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, CONTEXT, **settings))
    assert isinstance(model, Transformer)
    return model


@pytest.fixture
def llama(tokenizer: Tokenizer) -> Transformer:
    return random_model(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, CONTEXT, qk_norm=True))
