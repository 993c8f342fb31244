"""RMSNorm in Triton. One program normalises one row that stays in registers, so the forward reads x (and the
residual) once and writes y (and h) once: the floor for a memory-bound op. The backward reads grad_y and h once, writes
grad_x once, and keeps a partial weight gradient for each program of a persistent grid, which a second, tiny sum reduces
in a fixed order: no atomics, so gradients are the same at every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HIDDEN_SIZE = 65536  # one row must fit in the registers of one program


def supports(x: Tensor, weight: Tensor, *, residual: Tensor | None, eps: float, weight_offset: float) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"supports fp32, bf16 and fp16, not {x.dtype}"
    if x.shape[-1] > MAX_HIDDEN_SIZE:
        return f"supports hidden_size up to {MAX_HIDDEN_SIZE}, not {x.shape[-1]}"
    return None


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr,
    x_stride, residual_stride, hidden_size, eps, weight_offset,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < hidden_size
    h = tl.load(x_ptr + row * x_stride + columns, mask, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + row * residual_stride + columns, mask, 0.0).to(tl.float32)
        tl.store(h_ptr + row * hidden_size + columns, h, mask)
    rstd = tl.rsqrt(tl.sum(h * h) / hidden_size + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + columns, mask, 0.0).to(tl.float32) + weight_offset
    tl.store(y_ptr + row * hidden_size + columns, h * rstd * weight, mask)


@triton.jit
def _backward_kernel(
    grad_y_ptr, grad_h_ptr, h_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    grad_y_stride, grad_h_stride, h_stride, rows, hidden_size, weight_offset,
    HAS_GRAD_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    mask = columns < hidden_size
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        rstd = tl.load(rstd_ptr + row)
        normalized = tl.load(h_ptr + row * h_stride + columns, mask, 0.0).to(tl.float32) * rstd
        grad_y = tl.load(grad_y_ptr + row * grad_y_stride + columns, mask, 0.0).to(tl.float32)
        grad_weight += grad_y * normalized
        # Loaded for each row, out of the cache: held for all rows it would not fit in registers beside grad_weight.
        grad_normalized = grad_y * (tl.load(weight_ptr + columns, mask, 0.0).to(tl.float32) + weight_offset)
        mean = tl.sum(grad_normalized * normalized) / hidden_size
        grad_x = (grad_normalized - normalized * mean) * rstd
        if HAS_GRAD_H:
            grad_x += tl.load(grad_h_ptr + row * grad_h_stride + columns, mask, 0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * hidden_size + columns, grad_x, mask)
    tl.store(partial_ptr + tl.program_id(0) * hidden_size + columns, grad_weight, mask)


def _rows(t: Tensor) -> Tensor:
    """`t` as (rows, hidden_size) with unit stride in the last dimension; a view whenever strides allow it."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _num_warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = x.new_empty(0) if residual is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, h, rstd
    x_rows = _rows(x)
    residual_rows = x_rows if residual is None else _rows(residual)
    block = triton.next_power_of_2(x.shape[-1])
    _forward_kernel[(x_rows.shape[0],)](
        x_rows, residual_rows, weight.contiguous(), y, h, rstd,
        x_rows.stride(0), residual_rows.stride(0), x.shape[-1], eps, weight_offset,
        HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=_num_warps(block),
    )  # fmt: skip
    return y, h, rstd


def backward(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if h.numel() == 0:
        return grad_x, torch.zeros_like(weight)
    grad_y_rows, h_rows = _rows(grad_y), _rows(h)
    grad_h_rows = grad_y_rows if grad_h is None else _rows(grad_h)
    rows, hidden_size = h_rows.shape
    programs = min(rows, _persistent_programs(h.device))
    partial = torch.empty((programs, hidden_size), dtype=torch.float32, device=h.device)
    block = triton.next_power_of_2(hidden_size)
    _backward_kernel[(programs,)](
        grad_y_rows, grad_h_rows, h_rows, weight.contiguous(), rstd, grad_x, partial,
        grad_y_rows.stride(0), grad_h_rows.stride(0), h_rows.stride(0), rows, hidden_size, weight_offset,
        HAS_GRAD_H=grad_h is not None, BLOCK=block, num_warps=_num_warps(block),
    )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


def _persistent_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: enough to exercise the loop and the reduction
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
