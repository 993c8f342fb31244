"""Training from text files to a model directory."""

from fastlm.training.config import PRESETS, TrainingConfig, rnn_config, transformer_config
from fastlm.training.data import TokenDataset
from fastlm.training.evaluate import Evaluation, evaluate
from fastlm.training.loop import Progress
from fastlm.training.preparation import prepare
from fastlm.training.trainer import TrainingResult, train

__all__ = [
    "PRESETS",
    "Evaluation",
    "Progress",
    "TokenDataset",
    "TrainingConfig",
    "TrainingResult",
    "evaluate",
    "prepare",
    "rnn_config",
    "train",
    "transformer_config",
]
