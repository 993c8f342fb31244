"""On the CPU: `csrc/cpu/rms_norm.cpp` reads each row from memory once; plain torch makes a pass for each step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._core import native, native_missing

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def supports(x: Tensor, weight: Tensor, *, residual: Tensor | None, eps: float, weight_offset: float) -> str | None:
    if x.dtype not in DTYPES:
        return f"supports fp32 and bf16, not {x.dtype}"
    return native_missing()


def _rows(t: Tensor) -> Tensor:
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _scale(weight: Tensor, weight_offset: float) -> Tensor:
    weight = weight.float().contiguous()
    return weight + weight_offset if weight_offset else weight


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype)
    h = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=x.dtype)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    if x.numel() == 0:
        return y, h, rstd
    x_rows = _rows(x)
    residual_rows = x_rows if residual is None else _rows(residual)
    scale = _scale(weight, weight_offset)
    native().rms_norm_forward(
        DTYPES[x.dtype],
        x_rows.data_ptr(),
        0 if residual is None else residual_rows.data_ptr(),
        scale.data_ptr(),
        y.data_ptr(),
        h.data_ptr(),
        rstd.data_ptr(),
        *x_rows.shape,
        x_rows.stride(0),
        residual_rows.stride(0),
        eps,
        torch.get_num_threads(),
    )
    return y, h, rstd


def backward(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(h.shape, dtype=h.dtype)
    if h.numel() == 0:
        return grad_x, torch.zeros_like(weight)
    grad_y_rows, h_rows = _rows(grad_y), _rows(h)
    grad_h_rows = grad_y_rows if grad_h is None else _rows(grad_h)
    rows, hidden_size = h_rows.shape
    scale = _scale(weight, weight_offset)
    partial = torch.empty((native().rms_norm_partials(rows), hidden_size), dtype=torch.float32)
    native().rms_norm_backward(
        DTYPES[h.dtype],
        grad_y_rows.data_ptr(),
        0 if grad_h is None else grad_h_rows.data_ptr(),
        h_rows.data_ptr(),
        scale.data_ptr(),
        rstd.contiguous().data_ptr(),
        grad_x.data_ptr(),
        partial.data_ptr(),
        partial.shape[0],
        rows,
        hidden_size,
        grad_y_rows.stride(0),
        grad_h_rows.stride(0),
        h_rows.stride(0),
        torch.get_num_threads(),
    )
    return grad_x, partial.sum(0).to(weight.dtype)
