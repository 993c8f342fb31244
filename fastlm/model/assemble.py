"""A transformer around tensors that were read from a file: checked, then taken as they are, without a copy."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from fastlm.errors import CheckpointError
from fastlm.model.config import ModelConfig
from fastlm.model.transformer import Transformer

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assemble(
    config: ModelConfig, tensors: dict[str, Tensor], path: Path, *, dtype: torch.dtype | None = None
) -> Transformer:
    """The model of `config` with `tensors` as its weights, in evaluation mode.

    With `dtype` None, weights that have one dtype stay as they are; else the narrower ones are widened. Weights of
    RMSNorm may have a dtype of their own.

    Raises:
        CheckpointError: a tensor is missing, superfluous, or of another shape or kind than `config` asks for. `path` is
            what the message names.
    """
    if config.num_layers > len(tensors):
        raise CheckpointError(f"{path} has too few tensors for {config.num_layers} layers")
    with torch.device("meta"):
        model = Transformer(config)
    check_tensors(tensors, model.state_dict(), path)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    else:
        own = {n for n in tensors if config.norm == "rms_norm" and n.endswith("norm.weight")}
        common = reduce(torch.promote_types, {t.dtype for n, t in tensors.items() if n not in own})
        tensors = {name: tensor if name in own else tensor.to(common) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError unless `tensors` have the names and shapes of `expected`, and are floating-point."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the model does not have"
        raise CheckpointError(f"{path} does not fit the model's config: it {what}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{path} does not fit the model's config: {name} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"expected {tuple(expected[name].shape)} of fp32, bf16, fp16 or fp64"
            )
