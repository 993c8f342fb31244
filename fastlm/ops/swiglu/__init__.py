"""The gated activation of the feed-forward layer: act(gate) · up in one pass."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlm.ops._library import define_op
from fastlm.ops._registry import Op

ACTIVATIONS = ("silu", "gelu_tanh")


def swiglu(gate: Tensor, up: Tensor, *, activation: Literal["silu", "gelu_tanh"] = "silu") -> Tensor:
    """y = act(gate) · up, element by element.

    Args:
        gate: `(..., intermediate_size)`, fp32, bf16 or fp16. Any strides: the two halves of one fused projection's
            output are read where they lie.
        up: like `gate`.
        activation: "silu" is g · sigmoid(g) (SwiGLU); "gelu_tanh" the tanh approximation of GELU (GeGLU, as in Gemma).

    Returns:
        y, contiguous, in `gate`'s dtype. Arithmetic is fp32 and is rounded once, at the end. Differentiable once.

    Raises:
        ValueError: when shapes or dtypes differ, or the activation is unknown.

    Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, equation 6.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must be alike, not {tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    return _forward(gate, up, activation)


OP = Op("swiglu", swiglu, ("triton", "cpu", "reference"))


def _run_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return OP.select(gate, up, activation=activation).forward(gate, up, activation)


def _fake_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _run_backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return OP.select(gate, up, activation=activation).backward(grad_y, gate, up, activation)


def _fake_backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return _fake_forward(gate, up, activation), _fake_forward(gate, up, activation)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        return *_backward(grad_y, *ctx.saved_tensors, ctx.activation), None


_forward = define_op("swiglu(Tensor gate, Tensor up, str activation) -> Tensor", _run_forward, _fake_forward, _SwiGLU)
_backward = define_op(
    "swiglu_backward(Tensor grad_y, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
