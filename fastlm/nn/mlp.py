"""The feed-forward layer, gated and plain."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fastlm.ops import _products, swiglu


class SwiGLU(nn.Module):
    """down_proj(act(gate_proj(x)) · up_proj(x)): `(..., hidden_size)` -> the same shape.

    `activation` is "silu", or "gelu_tanh" as in Gemma. In training the product of act(gate) and up is not kept but
    made again on the way back.

    Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        activation: Literal["silu", "gelu_tanh"] = "silu",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self.gate_proj(x), self.up_proj(x))

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """What follows the first two projections."""
        down = self.down_proj
        learns = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
        if learns and type(down) is nn.Linear and down.bias is None and not torch.compiler.is_compiling():
            out: Tensor = _GatedProjection.apply(gate, up, down.weight.to(gate.dtype), self.activation)
            return out
        return down(swiglu(gate, up, activation=self.activation))


class _GatedProjection(torch.autograd.Function):
    """(act(gate) · up) @ weight.T, keeping gate and up alone.

    Their product is a third of what the layer would keep; making it again is one pass over memory, beside the matrix
    products of the layer less than a hundredth of the work.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.activation = activation
        return _products.linear(swiglu(gate, up, activation=activation), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        gate, up, weight = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[2]:
            product = swiglu(gate, up, activation=ctx.activation)
            grad_weight = _products.weight_gradient(grad_out.flatten(0, -2), product.flatten(0, -2))
            del product
        grad_gate, grad_up = torch.ops.fastlm.swiglu_backward(
            _products.input_gradient(grad_out, weight), gate, up, ctx.activation
        )
        return grad_gate, grad_up, grad_weight, None


class MLP(nn.Module):
    """down_proj(act(up_proj(x))): `(..., hidden_size)` -> the same shape, as in GPT-2.

    `activation` is "gelu", its approximation "gelu_tanh", or "silu".
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = True,
        activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu_tanh",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_proj(x)
        if self.activation == "silu":
            return self.down_proj(functional.silu(x))
        return self.down_proj(functional.gelu(x, approximate="none" if self.activation == "gelu" else "tanh"))
