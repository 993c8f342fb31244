"""A model directory: config.json, model.safetensors and, for a model of text, tokenizer.json.

A transformer's directory is Hugging Face's own format, see `fastlm.model.huggingface`; a recurrent model's differs in
what config.json says.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastlm._files import write_atomic
from fastlm.errors import CheckpointError, ConfigError
from fastlm.model.assemble import check_tensors
from fastlm.model.config import ModelConfig
from fastlm.model.huggingface import huggingface_content, huggingface_tensors, load_huggingface, save_huggingface
from fastlm.model.huggingface_config import config_to_huggingface
from fastlm.model.huggingface_layout import to_ours
from fastlm.model.rnn import RNNConfig, RNNLanguageModel
from fastlm.model.tensor_files import read_json_object, read_tensors, write_tensors
from fastlm.model.transformer import Transformer

LanguageModel = Transformer | RNNLanguageModel
AnyConfig = ModelConfig | RNNConfig


def build_model(config: AnyConfig) -> LanguageModel:
    """A model with random weights, drawn from torch's global generator."""
    return Transformer(config) if isinstance(config, ModelConfig) else RNNLanguageModel(config)


def save_model(model: LanguageModel, directory: str | Path, *, eos_token_id: int | None = None) -> None:
    """Writes the model's files into `directory`, each whole or not at all.

    Raises as `fastlm.model.huggingface.save_huggingface` does.
    """
    if isinstance(model, Transformer):
        save_huggingface(model, directory, eos_token_id=eos_token_id)
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_config(model.config, directory, eos_token_id=eos_token_id)
    write_weights(model, directory / "model.safetensors")


def write_config(config: AnyConfig, directory: Path, *, eos_token_id: int | None = None) -> None:
    if isinstance(config, ModelConfig):
        content = huggingface_content(config, eos_token_id=eos_token_id)
    else:
        content = config.to_dict(eos_token_id)
    write_atomic(directory / "config.json", json.dumps(content, indent=2) + "\n")


def write_weights(model: LanguageModel, path: Path) -> None:
    if isinstance(model, Transformer):
        tensors = huggingface_tensors(model)
    else:
        tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(tensors, path)


def load_weights(model: LanguageModel, path: Path) -> None:
    """Copies into `model` what `write_weights` wrote of a model of the same config.

    Raises CheckpointError when the file is missing or corrupt, and RuntimeError when it is of another model.
    """
    tensors = read_tensors(path)
    if isinstance(model, Transformer):
        tensors = to_ours(tensors, config_to_huggingface(model.config)["model_type"], model.config)
    model.load_state_dict(tensors)


def load_model(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LanguageModel:
    """The model that a directory holds, its weights checked by name, shape and dtype and mapped into memory.

    Args:
        dtype: what weights are converted to; None leaves them as they are stored.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or the weights do not fit config.json.
    """
    directory = Path(directory)
    content = read_json_object(directory / "config.json")
    if not str(content.get("model_type")).startswith("fastlm_"):
        return load_huggingface(directory, dtype=dtype).to(device)
    try:
        config = RNNConfig.from_dict(content)
    except ConfigError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from None
    path = directory / "model.safetensors"
    tensors = read_tensors(path)
    if config.num_layers > len(tensors):
        raise CheckpointError(f"{path} has too few tensors for {config.num_layers} layers")
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    check_tensors(tensors, expected, path)
    model = build_model(config)
    model.load_state_dict(tensors)
    return model.to(device, dtype).eval()
