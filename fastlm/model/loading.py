"""One way to load a model, whatever it is called and however it is stored."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from fastlm.errors import CheckpointError
from fastlm.model.adapter import CONFIG_FILE, load_adapter, merge_lora, read_adapter_config
from fastlm.model.checkpoint import LanguageModel, load_model
from fastlm.model.gguf import load_gguf
from fastlm.model.huggingface import HUB_ID, download
from fastlm.model.pretrained import NAMES, pretrained


class Loaded(NamedTuple):
    """A model, and the file that its tokenizer can be read from: a tokenizer.json, or the GGUF file itself."""

    model: LanguageModel
    tokenizer: Path | None


def load(name_or_path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Loaded:
    """Loads a model.

    Args:
        name_or_path: "gemma3-270m" (from the packages of `fastlm[gemma]`); a GGUF file; the directory of a run, a
            checkpoint, a Hugging Face model or a LoRA adapter (which is merged into its base); or a model's id on the
            Hugging Face hub, such as "Qwen/Qwen3-0.6B".
        dtype: what weights are converted to; None leaves them as they are stored, quantized ones too.

    Raises:
        CheckpointError: there is no such model, or it is corrupt or not supported; the message says which and what to
            do.
    """
    path = Path(name_or_path)
    if str(name_or_path) in NAMES:
        path = pretrained(str(name_or_path))
    elif not path.exists():
        if not HUB_ID.fullmatch(str(name_or_path)) or path.suffix == ".gguf":
            raise CheckpointError(
                f"there is no {name_or_path}; give the directory of a model, a .gguf file, an id of the Hugging Face "
                f"hub (owner/name), or {' or '.join(NAMES)}"
            )
        path = download(str(name_or_path))
    if path.is_file():
        return Loaded(load_gguf(path, dtype=dtype).to(device), path)
    if (path / CONFIG_FILE).is_file():
        return _with_adapter(path, dtype, device)
    tokenizer = path / "tokenizer.json"
    return Loaded(load_model(path, dtype=dtype, device=device), tokenizer if tokenizer.is_file() else None)


def _with_adapter(path: Path, dtype: torch.dtype | None, device: torch.device | str) -> Loaded:
    base_name = read_adapter_config(path).get("base_model_name_or_path")
    if not isinstance(base_name, str) or not base_name:
        raise CheckpointError(f"{path / CONFIG_FILE} does not name its base; load the base, then the adapter into it")
    if (Path(base_name) / CONFIG_FILE).is_file():
        raise CheckpointError(f"{path} adapts {base_name}, which is an adapter itself; merge that one first")
    base = load(base_name, dtype=dtype, device=device)
    if load_adapter(base.model, path):
        raise CheckpointError(f"{path} is of a classifier, which writes no text; see fastlm.model.load_classifier")
    merge_lora(base.model)
    tokenizer = path / "tokenizer.json"
    return Loaded(base.model, tokenizer if tokenizer.is_file() else base.tokenizer)
