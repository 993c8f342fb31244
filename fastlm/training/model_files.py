"""What a trained model consists of on disk: the whole model, or an adapter to a base that did not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from fastlm.errors import CheckpointError
from fastlm.model.adapter import LoRAConfig, load_adapter, save_adapter
from fastlm.model.checkpoint import LanguageModel, load_weights, write_config, write_weights
from fastlm.model.classifier import SequenceClassifier, read_classifier_weights, save_classifier, write_labels
from fastlm.model.transformer import Transformer


class ModelFiles(Protocol):
    """Writes a model, all of its files or none, and reads its weights back."""

    model: Any

    def write(self, directory: Path) -> None: ...

    def read(self, directory: Path) -> None: ...


class LanguageModelFiles:
    """config.json and model.safetensors of a language model."""

    def __init__(self, model: LanguageModel, eos_token_id: int | None) -> None:
        self.model: Any = model
        self.eos_token_id = eos_token_id

    def write(self, directory: Path) -> None:
        write_config(self.model.config, directory, eos_token_id=self.eos_token_id)
        write_weights(self.model, directory / "model.safetensors")

    def read(self, directory: Path) -> None:
        load_weights(self.model, directory / "model.safetensors")


class ClassifierFiles:
    """config.json and model.safetensors of a classifier."""

    def __init__(self, model: SequenceClassifier, eos_token_id: int | None) -> None:
        self.model: Any = model
        self.eos_token_id = eos_token_id

    def write(self, directory: Path) -> None:
        save_classifier(self.model, directory, eos_token_id=self.eos_token_id)

    def read(self, directory: Path) -> None:
        read_classifier_weights(self.model, directory)


class AdapterFiles:
    """adapter_config.json and adapter_model.safetensors, which holds a classifier's head as well."""

    def __init__(self, model: Transformer | SequenceClassifier, lora: LoRAConfig, base: str) -> None:
        self.model: Any = model
        self.lora = lora
        self.base = base

    def write(self, directory: Path) -> None:
        if isinstance(self.model, SequenceClassifier):
            save_adapter(
                self.model,
                self.lora,
                directory,
                base=self.base,
                task_type="SEQ_CLS",
                also={"score.weight": self.model.score.weight},
            )
            write_labels(self.model, directory)
        else:
            save_adapter(self.model, self.lora, directory, base=self.base, task_type="CAUSAL_LM")

    def read(self, directory: Path) -> None:
        whole = load_adapter(self.model, directory)
        if isinstance(self.model, SequenceClassifier):
            if "score.weight" not in whole or whole["score.weight"].shape != self.model.score.weight.shape:
                raise CheckpointError("the adapter lacks the weights of the classifier's head")
            with torch.no_grad():
                self.model.score.weight.copy_(whole["score.weight"])
