"""LoRA adapters of a transformer, in the format of PEFT: adapter_config.json and adapter_model.safetensors.

Our module names are Hugging Face's, so a tensor of ours differs from PEFT's by a prefix alone. GPT-2, whose q, k and v
are one matrix there, is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlm._files import write_atomic
from fastlm.errors import CheckpointError, ConfigError
from fastlm.model.config import ModelConfig
from fastlm.model.huggingface_config import config_to_huggingface
from fastlm.model.tensor_files import read_json_object, read_tensors, write_tensors
from fastlm.nn import LoRALinear, QuantizedLinear

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_RANK = 1 << 14  # a corrupt file must not make us ask for absurd memory
# What changes the arithmetic, and the only value of it that is understood.
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "alpha_pattern": {}}


@dataclass(frozen=True)
class LoRAConfig:
    """`targets`: names of the linear layers that are adapted; the update is scaled by alpha / rank."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= MAX_RANK:
            raise ConfigError(f"the rank of LoRA must be from 1 to {MAX_RANK}, not {self.rank!r}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"the alpha of LoRA must be a positive number, not {self.alpha!r}")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(f"LoRA adapts {', '.join(TARGETS)}, not {', '.join(unknown) or 'nothing'}")


def add_lora(model: nn.Module, lora: LoRAConfig) -> None:
    """Freezes every parameter of a model and puts a LoRALinear around its layers of the given names."""
    model.requires_grad_(False)
    for name, module in list(_linear_layers(model)):
        if name.rpartition(".")[2] in lora.targets:
            _replace(model, name, LoRALinear(module, lora.rank, lora.alpha / lora.rank))


def check_adaptable(config: ModelConfig) -> None:
    """Raises ConfigError for an architecture whose layers PEFT names or packs in another way."""
    if config_to_huggingface(config)["model_type"] == "gpt2":
        raise ConfigError("LoRA is not for GPT-2's layout, whose q, k and v are one matrix; tune all of the model")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA weights under PEFT's names."""
    return {
        f"{PREFIX}{name}.{part}.weight": getattr(module, part).weight.detach().contiguous()
        for name, module in _lora_layers(model)
        for part in ("lora_A", "lora_B")
    }


def save_adapter(
    model: nn.Module,
    lora: LoRAConfig,
    directory: Path,
    *,
    base: str,
    task_type: str,
    also: dict[str, Tensor] | None = None,
) -> None:
    """Writes the adapter as PEFT does.

    Args:
        base: name or path of the model that it adapts.
        task_type: PEFT's, "CAUSAL_LM" or "SEQ_CLS".
        also: whole weights that were trained beside it, such as those of a head, under our names.
    """
    also = also or {}
    content = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(lora.targets),
        "modules_to_save": sorted({name.split(".")[0] for name in also}) or None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
    tensors = adapter_tensors(model) | {PREFIX + name: tensor.detach() for name, tensor in also.items()}
    write_tensors(tensors, directory / WEIGHTS_FILE)
    write_atomic(directory / CONFIG_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json. Raises CheckpointError when it is missing, corrupt, or not of plain LoRA."""
    content = read_json_object(directory / CONFIG_FILE)
    for name, plain in PLAIN.items():
        if content.get(name, plain) not in (plain, None):
            value = content[name]
            raise CheckpointError(f"{directory / CONFIG_FILE}: {name}={value!r} is not supported: only {plain!r}")
    if type(content.get("r")) is not int or type(content.get("lora_alpha")) not in (int, float):
        raise CheckpointError(f"{directory / CONFIG_FILE} lacks the numbers r and lora_alpha; use an intact copy")
    return content


def load_adapter(model: nn.Module, directory: str | Path) -> dict[str, Tensor]:
    """Puts the adapter in `directory`, ours or PEFT's, around the layers of `model`, or into those that it has.

    Returns:
        The tensors of modules that were saved whole, under our names.

    Raises:
        CheckpointError: a file is missing or corrupt, not of plain LoRA, or does not fit the model.
    """
    directory = Path(directory)
    content = read_adapter_config(directory)
    path = directory / WEIGHTS_FILE
    layers = dict(_linear_layers(model)) | dict(_lora_layers(model))
    whole: dict[str, Tensor] = {}
    pairs: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in read_tensors(path).items():
        name = full_name.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.(lora_[AB])(?:\.default)?\.weight", name)
        if match is None:
            whole[name.replace(".modules_to_save.default.", ".")] = tensor
        else:
            pairs.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in pairs.items():
        layer = layers.get(name)
        if layer is None or pair.keys() != {"lora_A", "lora_B"}:
            raise CheckpointError(f"{path} does not fit the model: it has no linear layer {name}, or half of its pair")
        base = layer.base_layer if isinstance(layer, LoRALinear) else layer
        rank = pair["lora_A"].shape[0]
        if pair["lora_A"].shape != (rank, base.in_features) or pair["lora_B"].shape != (base.out_features, rank):
            shapes = " and ".join(str(tuple(t.shape)) for t in pair.values())
            raise CheckpointError(f"{path} does not fit the model: {name} has {shapes}, for rank {rank}")
        root = math.sqrt(rank) if content.get("use_rslora") else rank
        new = LoRALinear(base, rank, content["lora_alpha"] / root) if base is layer else layer
        with torch.no_grad():
            new.lora_A.weight.copy_(pair["lora_A"])
            new.lora_B.weight.copy_(pair["lora_B"])
        if new is not layer:
            _replace(model, name, new)
    if not pairs:
        raise CheckpointError(f"{path} holds no LoRA weights")
    return whole


def merge_lora(model: nn.Module) -> None:
    """Replaces every LoRALinear by the plain layer that computes the same."""
    for name, module in list(_lora_layers(model)):
        _replace(model, name, module.merged())


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers of the blocks that are not inside a LoRALinear."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear) and name.rpartition(".")[2] in TARGETS:
            yield name, module


def _lora_layers(model: nn.Module) -> Iterable[tuple[str, LoRALinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
