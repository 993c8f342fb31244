"""Gemma 3 270M, in 4 bits as its file holds it, learns by LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlm.errors import CheckpointError
from fastlm.model import load
from fastlm.model.adapter import LoRAConfig
from fastlm.nn import QuantizedLinear
from fastlm.training import FinetuneConfig, TrainingConfig, finetune, load_base
from fastlm.training.examples import Conversation

PAIRS = {
    "성생활이 증가하고 있다.": "Sexual activity is up.",
    "회의는 내일 아침에 열린다.": "The meeting will be held tomorrow morning.",
    "그는 어제 서울에 도착했다.": "He arrived in Seoul yesterday.",
    "가격이 다시 올랐다.": "Prices rose again.",
}
TRAINING = TrainingConfig(
    steps=6, batch_size=4, optimizer="adamw", learning_rate=1e-3, embedding_learning_rate=1e-3, warmup_steps=1,
    evaluations=0, checkpoint_seconds=1000, dtype="float32",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_gemma_learns_translations_over_its_quantized_weights(tmp_path: Path) -> None:
    try:
        base = load_base("gemma3-270m", keep_quantized=True)
    except CheckpointError as error:
        pytest.skip(str(error))
    pairs = [Conversation.of(ko, en) for ko, en in PAIRS.items()]
    quantized = {name: b.clone() for name, b in base.model.named_buffers() if b.dtype == torch.uint8}
    assert sum(isinstance(module, QuantizedLinear) for module in base.model.modules()) == 18 * 7
    config = FinetuneConfig("instruction", lora=LoRAConfig(8, 16.0), max_length=64)
    untouched = replace(TRAINING, steps=1, learning_rate=1e-12, embedding_learning_rate=1e-12)
    before = finetune(base, (pairs, pairs), tmp_path / "before", config, untouched).metrics["loss"]
    base = load_base("gemma3-270m", keep_quantized=True)
    result = finetune(base, (pairs, pairs), tmp_path / "adapter", config, TRAINING)
    assert result.metrics["loss"] < 0.5 * before
    assert result.trained_parameters < 0.02 * result.parameters
    for name, buffer in base.model.named_buffers():
        if buffer.dtype == torch.uint8:
            assert torch.equal(buffer, quantized[name.replace("base_layer.", "")]), name
    assert load(tmp_path / "adapter").model.config == base.model.config
