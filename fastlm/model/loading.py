"""One way to load a model, whatever it is called and however it is stored."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from fastlm.errors import CheckpointError
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
            checkpoint or a Hugging Face model; or a model's id on the Hugging Face hub, such as "Qwen/Qwen3-0.6B".
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
    tokenizer = path / "tokenizer.json"
    return Loaded(load_model(path, dtype=dtype, device=device), tokenizer if tokenizer.is_file() else None)
