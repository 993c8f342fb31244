"""Language models, and model directories."""

from fastlm.model.checkpoint import build_model, load_model, save_model
from fastlm.model.classifier import SequenceClassifier, load_classifier, save_classifier
from fastlm.model.config import ModelConfig
from fastlm.model.loading import Loaded, load
from fastlm.model.rnn import RNNConfig, RNNLanguageModel
from fastlm.model.transformer import Transformer

__all__ = [
    "Loaded",
    "ModelConfig",
    "RNNConfig",
    "RNNLanguageModel",
    "SequenceClassifier",
    "Transformer",
    "build_model",
    "load",
    "load_classifier",
    "load_model",
    "save_classifier",
    "save_model",
]
