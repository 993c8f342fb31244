"""The gated feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from fastlm.ops import swiglu


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) · up_proj(x)): `(..., hidden_size)` -> the same shape.

    Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
