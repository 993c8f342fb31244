"""The gated activation in Triton. Each program takes one stretch of one row: the forward reads gate and up once and
writes y once, the backward reads grad_y, gate and up once and writes two gradients once, the floor for a memory-bound
op; nothing but the inputs is kept for the backward. Rows may be strided, so the halves of a fused projection are read
in place. Both activations are g · sigmoid(w): w = g for SiLU, and for GELU 0.5 · (1 + tanh(u)) = sigmoid(2u).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program: 16-byte loads for each of 128 threads in bf16


def supports(gate: Tensor, up: Tensor, *, activation: str) -> str | None:
    if gate.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"supports fp32, bf16 and fp16, not {gate.dtype}"
    return None


@triton.jit
def _inner(g, GELU: tl.constexpr):
    """w of act(g) = g · sigmoid(w), and its derivative."""
    if GELU:
        w = 1.5957691216057308 * (g + 0.044715 * g * g * g)  # 2 · sqrt(2 / pi)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        w = g
        slope = g * 0.0 + 1.0
    return w, slope


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, columns, column_blocks, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // column_blocks).to(tl.int64)
    offsets = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < columns
    g = tl.load(gate_ptr + row * gate_stride + offsets, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + offsets, mask, 0.0).to(tl.float32)
    w, _ = _inner(g, GELU)
    tl.store(y_ptr + row * columns + offsets, g * tl.sigmoid(w) * up, mask)


@triton.jit
def _backward_kernel(
    grad_y_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, grad_y_stride, gate_stride, up_stride,
    columns, column_blocks, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // column_blocks).to(tl.int64)
    offsets = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < columns
    grad = tl.load(grad_y_ptr + row * grad_y_stride + offsets, mask, 0.0).to(tl.float32)
    g = tl.load(gate_ptr + row * gate_stride + offsets, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + offsets, mask, 0.0).to(tl.float32)
    w, slope = _inner(g, GELU)
    sigmoid = tl.sigmoid(w)
    activated = g * sigmoid
    derivative = sigmoid + activated * (1.0 - sigmoid) * slope
    tl.store(grad_gate_ptr + row * columns + offsets, grad * up * derivative, mask)
    tl.store(grad_up_ptr + row * columns + offsets, grad * activated, mask)


def _rows(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors as (rows, columns) of unit column stride: one long row when all are contiguous, else views wherever
    strides allow them."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    rows = [t.reshape(-1, t.shape[-1]) for t in tensors]
    return [t if t.stride(-1) == 1 else t.contiguous() for t in rows]


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    gate_rows, up_rows = _rows([gate, up])
    rows, columns = gate_rows.shape
    blocks = triton.cdiv(columns, BLOCK)
    _forward_kernel[(rows * blocks,)](
        gate_rows, up_rows, y, gate_rows.stride(0), up_rows.stride(0), columns, blocks,
        GELU=activation == "gelu_tanh", BLOCK=BLOCK,
    )  # fmt: skip
    return y


def backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if gate.numel() == 0:
        return grad_gate, grad_up
    grad_rows, gate_rows, up_rows = _rows([grad_y, gate, up])
    rows, columns = gate_rows.shape
    blocks = triton.cdiv(columns, BLOCK)
    _backward_kernel[(rows * blocks,)](
        grad_rows, gate_rows, up_rows, grad_gate, grad_up, grad_rows.stride(0), gate_rows.stride(0), up_rows.stride(0),
        columns, blocks, GELU=activation == "gelu_tanh", BLOCK=BLOCK,
    )  # fmt: skip
    return grad_gate, grad_up
