"""A transformer, and recurrent networks of as many parameters."""

from __future__ import annotations

from typing import Literal

import torch

from fastlm.model import ModelConfig, build_model
from fastlm.model.checkpoint import AnyConfig
from fastlm.model.rnn import CELLS, RNNConfig

Kind = Literal["transformer", "rnn", "lstm", "gru"]


def matched(transformer: ModelConfig) -> dict[Kind, AnyConfig]:
    """The transformer, and of each cell the width whose number of parameters is nearest to its."""
    target = parameters(transformer)
    found: dict[Kind, AnyConfig] = {"transformer": transformer}
    for cell in CELLS:
        configs = [
            RNNConfig(transformer.vocab_size, width, 1, transformer.context_length, cell) for width in range(8, 400)
        ]
        found[cell] = min(configs, key=lambda c: abs(parameters(c) - target))  # type: ignore[index]
    return found


def parameters(config: AnyConfig) -> int:
    """Counted on the meta device, where weights take no memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config).parameters())


def transformer(vocab_size: int, hidden_size: int, context_length: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=hidden_size // 2,
        intermediate_size=3 * hidden_size,
        context_length=context_length,
    )
