"""On the CPU: `csrc/cpu/swiglu.cpp`, one pass over memory where plain torch makes two forward and five backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._core import native, native_missing

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def supports(gate: Tensor, up: Tensor, *, activation: str) -> str | None:
    if gate.dtype not in DTYPES:
        return f"supports fp32 and bf16, not {gate.dtype}"
    return native_missing()


def _rows(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors as (rows, columns) of unit column stride: one long row when all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    rows = [t.reshape(-1, t.shape[-1]) for t in tensors]
    return [t if t.stride(-1) == 1 else t.contiguous() for t in rows]


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype)
    if y.numel() == 0:
        return y
    gate, up = _rows([gate, up])
    native().swiglu_forward(
        DTYPES[gate.dtype],
        gate.data_ptr(),
        up.data_ptr(),
        y.data_ptr(),
        *gate.shape,
        gate.stride(0),
        up.stride(0),
        activation == "gelu_tanh",
        torch.get_num_threads(),
    )
    return y


def backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    if gate.numel() == 0:
        return grad_gate, grad_up
    grad_y, gate, up = _rows([grad_y, gate, up])
    native().swiglu_backward(
        DTYPES[gate.dtype],
        grad_y.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        grad_gate.data_ptr(),
        grad_up.data_ptr(),
        *gate.shape,
        grad_y.stride(0),
        gate.stride(0),
        up.stride(0),
        activation == "gelu_tanh",
        torch.get_num_threads(),
    )
    return grad_gate, grad_up
