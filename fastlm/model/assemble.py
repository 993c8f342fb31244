"""A transformer around tensors that were read from a file: checked, then taken as they are, without a copy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlm.errors import CheckpointError
from fastlm.model.config import ModelConfig
from fastlm.model.transformer import Transformer
from fastlm.nn import QuantizedEmbedding, QuantizedLinear
from fastlm.ops.quantized_linear import FORMATS, dequantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _NoInitialValues(TorchFunctionMode):
    """Leaves out `torch.nn.init`, whose random numbers on the meta device import half of torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class Quantized(NamedTuple):
    """A matrix in one of GGUF's block formats: `(rows, row_bytes)` uint8."""

    data: Tensor
    quantization: str

    @property
    def shape(self) -> tuple[int, int]:
        block = FORMATS[self.quantization]
        return self.data.shape[0], self.data.shape[1] // block.block_bytes * block.block_size


Weights = Mapping[str, Tensor | Quantized]


def assemble(config: ModelConfig, tensors: Weights, path: Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """The model of `config` with `tensors` as its weights, in evaluation mode.

    With `dtype` None, weights stay as they are if their matrices have one dtype; else the narrower ones are widened.
    Beside quantized matrices the dtype is fp32. With a `dtype`, all are converted to it.

    Raises:
        CheckpointError: a tensor is missing, superfluous, or of another shape or kind than `config` asks for. `path` is
            what the message names.
    """
    if config.num_layers > len(tensors):
        raise CheckpointError(f"{path} has too few tensors for {config.num_layers} layers")
    with torch.device("meta"), _NoInitialValues():
        model = Transformer(config)
        check_tensors(tensors, model.state_dict(), path)
        tensors = _of_one_dtype(tensors, config) if dtype is None else _converted(tensors, dtype)
        for name, tensor in tensors.items():
            if isinstance(tensor, Quantized):
                _replace_by_quantized(model, name.removesuffix(".weight"), tensor.quantization)
    state = {name: tensor.data if isinstance(tensor, Quantized) else tensor for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_tensors(tensors: Weights, expected: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError unless `tensors` have the names and shapes of `expected`, and are floating-point or, where
    a matrix is expected, quantized.
    """
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the model does not have"
        raise CheckpointError(f"{path} does not fit the model's config: it {what}")
    for name, tensor in tensors.items():
        kind = tensor.quantization if isinstance(tensor, Quantized) else tensor.dtype
        if tuple(tensor.shape) != tuple(expected[name].shape) or not (isinstance(kind, str) or kind in DTYPES):
            raise CheckpointError(
                f"{path} does not fit the model's config: {name} is {tuple(tensor.shape)} {kind}, "
                f"expected {tuple(expected[name].shape)} of fp32, bf16, fp16 or fp64"
            )


def _converted(tensors: Weights, dtype: torch.dtype) -> dict[str, Tensor | Quantized]:
    return {
        name: dequantize(tensor.data, tensor.quantization, dtype) if isinstance(tensor, Quantized) else tensor.to(dtype)
        for name, tensor in tensors.items()
    }


def _of_one_dtype(tensors: Weights, config: ModelConfig) -> dict[str, Tensor | Quantized]:
    """Matrices get the widest dtype among them. Vectors follow if they lose nothing; those of RMSNorm may differ."""
    floats = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    own = {name for name in floats if config.norm == "rms_norm" and name.endswith("norm.weight")}
    dtypes = {tensor.dtype for tensor in floats.values() if tensor.ndim > 1}
    if len(floats) < len(tensors):
        dtypes.add(torch.float32)
    common = reduce(torch.promote_types, dtypes)
    vectors = [tensor for name, tensor in floats.items() if tensor.ndim == 1 and name not in own]
    if not all(torch.equal(vector.to(common).to(vector.dtype), vector) for vector in vectors):
        common = reduce(torch.promote_types, [vector.dtype for vector in vectors], common)
    return {
        name: tensor if isinstance(tensor, Quantized) or name in own else tensor.to(common)
        for name, tensor in tensors.items()
    }


def _replace_by_quantized(model: Transformer, name: str, quantization: str) -> None:
    module = model.get_submodule(name)
    new: nn.Module
    if isinstance(module, nn.Embedding):
        new = QuantizedEmbedding(module.num_embeddings, module.embedding_dim, quantization)
    else:
        assert isinstance(module, nn.Linear)  # no other module has a matrix
        new = QuantizedLinear(module.in_features, module.out_features, quantization, bias=module.bias is not None)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
