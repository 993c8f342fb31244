"""RMSNorm and LayerNorm as modules, each with the residual addition before it if one is given."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from fastlm.ops import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, with the residual addition before it if one is given.

    Args:
        hidden_size: length of the last dimension.
        eps: added to the mean square.
        weight_offset: 1.0 for Gemma, whose checkpoints store weight - 1.

    Shapes: x `(..., hidden_size)` -> y of the same shape and dtype; with `residual`, the pair (y, x + residual).
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight_offset = weight_offset
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - weight_offset))

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, residual=residual, eps=self.eps, weight_offset=self.weight_offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm with RMSNorm's interface: given `residual`, it returns the pair (y, x + residual).

    Ba et al., "Layer Normalization", arXiv 1607.06450.
    """

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return super().forward(x)
        x = x + residual
        return super().forward(x), x
