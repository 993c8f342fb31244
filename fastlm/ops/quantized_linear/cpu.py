"""On the CPU: `csrc/cpu/quantized_linear.cpp` reads the blocks from memory once for up to 192 rows of x.

x is rounded to 8 bits in groups of 32, as llama.cpp does, so that products are integer dot products. With few rows the
weights' bytes limit, with many the dot products.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastlm._core import native, native_missing


def supports(x: Tensor, weight: Tensor, quantization: str, bias: Tensor | None) -> str | None:
    if weight.device.type != "cpu":
        return f"runs on CPU tensors; the weight is on {weight.device}"
    return native_missing()


def serves_directly(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a call may go straight to `quantized_linear`, which saves 6 µs of dispatch: half of a small layer's time.

    Not where torch traces or differentiates, or where tensors are not plain.
    """
    return (
        x.is_cpu
        and weight.is_cpu
        and type(x) is type(weight) is Tensor
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and os.environ.get("FASTLM_BACKEND", "") in ("", "cpu")
        and native_missing() is None
    )


def quantized_linear(x: Tensor, weight: Tensor, quantization: str, bias: Tensor | None) -> Tensor:
    in_features, out_features = x.shape[-1], weight.shape[0]
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    if y.numel() == 0:
        return y
    if x.is_contiguous():
        x_stride = in_features
    else:
        x = x.reshape(-1, in_features)
        x = x if x.stride(1) == 1 else x.contiguous()
        x_stride = x.stride(0)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    run = native().quantized_linear_float32 if x.dtype == torch.float32 else native().quantized_linear_bfloat16
    run(
        quantization,
        x.data_ptr(),
        y.numel() // out_features,
        in_features,
        x_stride,
        weight.data_ptr(),
        out_features,
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
