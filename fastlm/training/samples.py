"""What a model in training writes after a prompt."""

from __future__ import annotations

import torch

from fastlm.inference.engine import Engine
from fastlm.inference.sampling_params import SamplingParams
from fastlm.model.checkpoint import LanguageModel
from fastlm.tokenizer import Tokenizer

SAMPLE_TOKENS = 48
TEMPERATURE = 0.8


@torch.no_grad()
def sample_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str) -> str:
    """The continuation, the same each time for the same weights. Changes neither the model nor torch's random state."""
    was_training = model.training
    engine = Engine(model, tokenizer, max_sequences=1, past_context="reread")
    try:
        engine.add_request(0, prompt, SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=TEMPERATURE, seed=0))
        text = ""
        while engine.has_work:
            text += "".join(piece.text for piece in engine.step())
    finally:
        model.train(was_training)
    return text
