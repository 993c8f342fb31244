"""The definition, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def supports(gate: Tensor, up: Tensor, *, activation: str) -> str | None:
    return None


def swiglu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """Differentiable by autograd. Computes in fp32, or fp64 for fp64 input."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(wide)
    activated = functional.silu(g) if activation == "silu" else functional.gelu(g, approximate="tanh")
    return (activated * up.to(wide)).to(gate.dtype)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return swiglu(gate, up, activation=activation).contiguous()


def backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, grad = gate.to(wide), grad_y.to(wide)
    if activation == "silu":
        sigmoid = torch.sigmoid(g)
        activated = g * sigmoid
        derivative = sigmoid * (1 + g * (1 - sigmoid))
    else:
        slope = math.sqrt(2 / math.pi)
        tanh = torch.tanh(slope * (g + 0.044715 * g**3))
        activated = 0.5 * g * (1 + tanh)
        derivative = 0.5 * (1 + tanh) + 0.5 * g * (1 - tanh * tanh) * slope * (1 + 3 * 0.044715 * g * g)
    grad_gate = (grad * up.to(wide) * derivative).to(gate.dtype)
    return grad_gate.contiguous(), (grad * activated).to(gate.dtype).contiguous()
