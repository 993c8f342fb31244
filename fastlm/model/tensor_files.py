"""Reading and writing safetensors and JSON files of a model directory, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastlm._files import atomic_path
from fastlm.errors import CheckpointError


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
    """Maps a safetensors file into memory: nothing is read before it is used, and what is changed is changed in memory
    alone. Raises CheckpointError when the file is missing, truncated or corrupt.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the directory of a trained model") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); use an intact copy") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises CheckpointError when `path` is missing or does not hold a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the directory of a trained model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); use an intact copy") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files that a model.safetensors.index.json names, which must lie beside it.

    Raises:
        CheckpointError: a file is missing or corrupt, or does not hold exactly the tensors that the index says.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files; use an intact copy")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {file!r}, which is no safetensors file beside it")
        shard = read_tensors(index.parent / file)
        named = {name for name, place in weight_map.items() if place == file}
        for name in sorted(named ^ shard.keys()):
            what = "lacks" if name in named else "holds"
            raise CheckpointError(f"{index.parent / file} {what} {name}, unlike {index.name}; use intact copies")
        tensors |= shard
    return tensors
