"""A Hugging Face directory: config.json, model.safetensors (or shards with an index), generation_config.json,
tokenizer.json. Weights are mapped into memory and never unpickled.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm._files import write_atomic
from fastlm.errors import CheckpointError, ConfigError
from fastlm.model.assemble import assemble
from fastlm.model.config import ModelConfig
from fastlm.model.huggingface_config import config_from_huggingface, config_to_huggingface
from fastlm.model.huggingface_layout import from_ours, to_ours
from fastlm.model.tensor_files import read_json_object, read_shards, read_tensors, write_tensors
from fastlm.model.transformer import Transformer

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DOWNLOADED = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json"]


def load_huggingface(directory: str | Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """The model in a Hugging Face directory, checked by name, shape and dtype.

    Args:
        dtype: what weights are converted to; None leaves them as they are stored, mapped and not copied.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, the architecture or one of its options is not
            supported, or the weights do not fit config.json.
    """
    directory = Path(directory)
    content = read_json_object(directory / "config.json")
    try:
        config = config_from_huggingface(content)
    except ConfigError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from None
    path, tensors = _read_weights(directory)
    try:
        tensors = to_ours(tensors, content["model_type"], config)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit config.json: {error}") from None
    return assemble(config, tensors, path, dtype=dtype)


def _read_weights(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        pickles = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        if pickles and not single.exists():
            raise CheckpointError(
                f"{directory} holds its weights as {pickles[0]}, a pickle, which can run any code when it is loaded; "
                "get the model as model.safetensors, or convert it where you trust its source "
                "(transformers: model.save_pretrained)"
            )
        return single, read_tensors(single)
    return index, read_shards(index)


def save_huggingface(
    model: Transformer,
    directory: str | Path,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> None:
    """Writes config.json, generation_config.json and model.safetensors, each whole or not at all, for
    `transformers.AutoModelForCausalLM.from_pretrained`.

    Raises:
        ConfigError: no architecture of transformers has the model's combination of options.
        CheckpointError: the weights are quantized.
    """
    directory = Path(directory)
    weights = huggingface_tensors(model)
    content = huggingface_content(model.config, bos_token_id=bos_token_id, eos_token_id=eos_token_id, dtype=model.dtype)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "config.json", json.dumps(content, indent=2) + "\n")
    generation = {name: content[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_atomic(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    write_tensors(weights, directory / "model.safetensors")


def huggingface_content(
    config: ModelConfig,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The whole config.json. Raises ConfigError as `config_to_huggingface` does."""
    return {
        **config_to_huggingface(config),
        "bos_token_id": eos_token_id if bos_token_id is None else bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
    }


def huggingface_tensors(model: Transformer) -> dict[str, Tensor]:
    """The weights under the names of the architecture that `huggingface_content` chooses."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if any(tensor.dtype == torch.uint8 for tensor in tensors.values()):
        raise CheckpointError("the weights are quantized; load the model with dtype=torch.float32 to save it")
    return from_ours(tensors, config_to_huggingface(model.config)["model_type"])


def download(repository: str) -> Path:
    """The directory of a model of the Hugging Face hub, downloaded unless it is there already.

    Raises:
        CheckpointError: huggingface_hub is not installed, or the model cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"{repository} is no file or directory here; to get it from the Hugging Face hub: "
            "pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(repository, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{repository} is no file or directory here, and the Hugging Face hub did not give it ({reason}); "
            "check the name, the network and your access, or give a local directory"
        ) from None
