"""Training from text files to a model directory, and fine-tuning from there."""

from fastlm.training.config import PRESETS, Preset, TrainingConfig, rnn_config, transformer_config
from fastlm.training.data import MixedDataset, TokenDataset
from fastlm.training.evaluate import Evaluation, evaluate
from fastlm.training.finetune import (
    Base,
    FinetuneConfig,
    FinetuneResult,
    finetune,
    load_base,
    merge_adapter,
    steps_of,
)
from fastlm.training.loop import Progress
from fastlm.training.preparation import prepare
from fastlm.training.trainer import TrainingResult, train

__all__ = [
    "PRESETS",
    "Base",
    "Evaluation",
    "FinetuneConfig",
    "FinetuneResult",
    "MixedDataset",
    "Preset",
    "Progress",
    "TokenDataset",
    "TrainingConfig",
    "TrainingResult",
    "evaluate",
    "finetune",
    "load_base",
    "merge_adapter",
    "prepare",
    "rnn_config",
    "steps_of",
    "train",
    "transformer_config",
]
