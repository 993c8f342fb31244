"""The definition, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(x: Tensor, weight: Tensor, *, residual: Tensor | None, eps: float, weight_offset: float) -> str | None:
    return None


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns (y, h); differentiable by autograd. Computes in fp32, or fp64 for fp64 input."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * (weight.to(wide) + weight_offset)
    return y.to(x.dtype), h.to(x.dtype)


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, h = rms_norm(x, weight, residual=residual, eps=eps, weight_offset=weight_offset)
    wide = x.float() if residual is None else x.float() + residual.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return y.contiguous(), x.new_empty(0) if residual is None else h.contiguous(), rstd


def backward(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(h.dtype, torch.float32)
    normalized = h.to(wide) * rstd[..., None]
    grad = grad_y.to(wide)
    grad_normalized = grad * (weight.to(wide) + weight_offset)
    mean = (grad_normalized * normalized).mean(-1, keepdim=True)
    grad_x = (grad_normalized - normalized * mean) * rstd[..., None]
    if grad_h is not None:
        grad_x = grad_x + grad_h.to(wide)
    grad_weight = (grad * normalized).reshape(-1, h.shape[-1]).sum(0)
    return grad_x.to(h.dtype).contiguous(), grad_weight.to(weight.dtype)
