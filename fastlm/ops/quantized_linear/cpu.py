"""On the CPU: `csrc/cpu/quantized_linear.cpp` reads the blocks from memory once for up to 192 rows of x.

x is rounded to 8 bits in groups of 32, as llama.cpp does, so that products are integer dot products. With few rows the
weights' bytes limit, with many the dot products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._core import native, native_missing


def supports(x: Tensor, weight: Tensor, quantization: str, bias: Tensor | None) -> str | None:
    if weight.device.type != "cpu":
        return f"runs on CPU tensors; the weight is on {weight.device}"
    return native_missing()


def quantized_linear(x: Tensor, weight: Tensor, quantization: str, bias: Tensor | None) -> Tensor:
    out_features = weight.shape[0]
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(y.numel() // max(out_features, 1), x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    run = native().quantized_linear_float32 if x.dtype == torch.float32 else native().quantized_linear_bfloat16
    run(
        quantization,
        rows.data_ptr(),
        *rows.shape,
        rows.stride(0),
        weight.data_ptr(),
        out_features,
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
