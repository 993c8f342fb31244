"""A model directory: config.json, model.safetensors and, for a model of text, tokenizer.json.

Directories of a Llama or Qwen 3 model are Hugging Face's own format: `transformers.AutoModelForCausalLM` loads what is
written here, and what is written there loads here if the model has no feature that ours lacks.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastlm._files import atomic_path, write_atomic
from fastlm.errors import CheckpointError, ConfigError
from fastlm.model.config import ModelConfig
from fastlm.model.rnn import RNNConfig, RNNLanguageModel
from fastlm.model.transformer import Transformer

LanguageModel = Transformer | RNNLanguageModel
AnyConfig = ModelConfig | RNNConfig


def build_model(config: AnyConfig) -> LanguageModel:
    """A model with random weights, drawn from torch's global generator."""
    return Transformer(config) if isinstance(config, ModelConfig) else RNNLanguageModel(config)


def save_model(model: LanguageModel, directory: str | Path, *, eos_token_id: int | None = None) -> None:
    """Writes config.json and model.safetensors into `directory`, each whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_config(model.config, directory, eos_token_id=eos_token_id)
    write_weights(model, directory / "model.safetensors")


def write_config(config: AnyConfig, directory: Path, *, eos_token_id: int | None = None) -> None:
    content = config.to_huggingface(eos_token_id) if isinstance(config, ModelConfig) else config.to_dict(eos_token_id)
    write_atomic(directory / "config.json", json.dumps(content, indent=2) + "\n")


def write_weights(model: LanguageModel, path: Path) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(tensors, path)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file, whole or not at all. Raises OSError when the disk is full."""
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps the operating system's error in its own type
            raise OSError(None, str(error), str(path)) from error
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes for the owner alone


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file. Raises CheckpointError when it is missing, truncated or corrupt."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the directory of a trained model") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); use an intact copy") from None


def read_config(directory: str | Path) -> AnyConfig:
    """Reads config.json of a model directory. Raises CheckpointError or ConfigError with the file's name."""
    path = Path(directory) / "config.json"
    content = read_json_object(path)
    try:
        if str(content.get("model_type")).startswith("fastlm_"):
            return RNNConfig.from_dict(content)
        return ModelConfig.from_huggingface(content)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises CheckpointError when `path` is missing or does not hold a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the directory of a trained model") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); use an intact copy") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def load_model(directory: str | Path, *, device: torch.device | str = "cpu") -> LanguageModel:
    """Builds the model that a directory describes and fills in its weights, checked by name, shape and dtype.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or the weights do not fit config.json.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = read_tensors(directory / "model.safetensors")
    if config.num_layers > len(tensors):
        raise CheckpointError(f"{directory / 'model.safetensors'} has too few tensors for {config.num_layers} layers")
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    _check_tensors(tensors, expected, directory / "model.safetensors")
    model = build_model(config)
    model.load_state_dict(tensors)
    return model.to(device).eval()


def _check_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], path: Path) -> None:
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the model does not have"
        raise CheckpointError(f"{path} does not fit config.json: it {what}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{path} does not fit config.json: {name} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"expected {tuple(expected[name].shape)} of a floating-point type"
            )
