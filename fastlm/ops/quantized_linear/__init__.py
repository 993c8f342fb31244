"""A linear layer over weights that stay in GGUF's block formats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlm.ops._library import define_op
from fastlm.ops._registry import Op
from fastlm.ops.quantized_linear import cpu, reference
from fastlm.ops.quantized_linear.formats import FORMATS, in_features

__all__ = ["FORMATS", "dequantize", "in_features", "quantized_linear"]


def quantized_linear(x: Tensor, weight: Tensor, quantization: str, bias: Tensor | None = None) -> Tensor:
    """y = x · Wᵀ + bias, W being `dequantize(weight, quantization)`, which is never materialised by the fast backends.

    A row of x gives the same bits whatever other rows x has.

    Args:
        x: `(..., in_features)`, fp32 or bf16.
        weight: `(out_features, row_bytes)` uint8, rows of blocks as GGUF stores them; each row contiguous. It may lie
            in a read-only memory map, at any alignment.
        quantization: "q8_0", "q5_0" or "q4_0", with in_features a multiple of 32; "q4_k", "q5_k" or "q6_k", with a
            multiple of 256.
        bias: `(out_features,)`, any floating dtype, or None.

    Returns:
        `(..., out_features)` in x's dtype. Backend `cpu` rounds x to 8 bits in groups of 32, as llama.cpp does: a
        relative error of about 0.5 % of y's norm. Differentiable once in x and bias: the weights, as numbers, are
        materialised for that.

    Raises:
        ValueError: when shapes, dtypes or the quantization do not fit.

    The formats are ggml's: https://github.com/ggml-org/ggml, `ggml-common.h`.
    """
    _check_weight(weight, quantization)
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x must be fp32 or bf16, not {x.dtype}")
    expected = in_features(quantization, weight.shape[1])
    if x.ndim == 0 or x.shape[-1] != expected:
        raise ValueError(
            f"x must be (..., {expected}) for {quantization} rows of {weight.shape[1]} bytes, not {tuple(x.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias must be ({weight.shape[0]},) floating, not {tuple(bias.shape)} {bias.dtype}")
    if cpu.serves_directly(x, weight, bias):
        return cpu.quantized_linear(x, weight, quantization, bias)
    return _quantized_linear(x, weight, quantization, bias)


def dequantize(weight: Tensor, quantization: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights as numbers: `(rows, row_bytes)` uint8 to `(rows, in_features)`, ggml's values rounded to `dtype`.

    An embedding is `dequantize(weight[ids], quantization)`.

    Raises:
        ValueError: when the shape, the dtype or the quantization does not fit.
    """
    _check_weight(weight, quantization)
    in_features(quantization, weight.shape[1])
    return reference.dequantize(weight, quantization).to(dtype)


def _check_weight(weight: Tensor, quantization: str) -> None:
    if weight.dtype != torch.uint8 or weight.ndim != 2:
        raise ValueError(f"weight must be (rows, row_bytes) uint8, not {tuple(weight.shape)} {weight.dtype}")
    if quantization not in FORMATS:
        raise ValueError(f"quantization must be one of {', '.join(FORMATS)}, not {quantization!r}")


OP = Op("quantized_linear", quantized_linear, ("cpu", "reference"))


def _run(x: Tensor, weight: Tensor, quantization: str, bias: Tensor | None) -> Tensor:
    return OP.select(x, weight, quantization, bias).quantized_linear(x, weight, quantization, bias)


def _fake(x: Tensor, weight: Tensor, quantization: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, quantization: str, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.quantization = quantization
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _quantized_linear(x, weight, quantization, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        grad_x = grad_y.float() @ reference.dequantize(weight, ctx.quantization)
        grad_bias = (
            None if ctx.bias_dtype is None else grad_y.float().reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype)
        )
        return grad_x.to(grad_y.dtype), None, None, grad_bias


_quantized_linear = define_op(
    "quantized_linear(Tensor x, Tensor weight, str quantization, Tensor? bias) -> Tensor",
    _run,
    _fake,
    _QuantizedLinear,
)
