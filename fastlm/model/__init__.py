"""Language models, and model directories."""

from fastlm.model.checkpoint import build_model, load_model, save_model
from fastlm.model.config import ModelConfig
from fastlm.model.loading import Loaded, load
from fastlm.model.rnn import RNNConfig, RNNLanguageModel
from fastlm.model.transformer import Transformer

__all__ = [
    "Loaded",
    "ModelConfig",
    "RNNConfig",
    "RNNLanguageModel",
    "Transformer",
    "build_model",
    "load",
    "load_model",
    "save_model",
]
