"""The feed-forward layer, gated and plain."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from fastlm.ops import swiglu


class SwiGLU(nn.Module):
    """down_proj(act(gate_proj(x)) · up_proj(x)): `(..., hidden_size)` -> the same shape.

    `activation` is "silu", or "gelu_tanh" as in Gemma.

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
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), activation=self.activation))


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
