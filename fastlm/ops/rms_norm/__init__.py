"""Root-mean-square normalisation, optionally fused with the residual addition before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlm.ops._library import define_op
from fastlm.ops._registry import Op


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = h / sqrt(mean(h²) + eps) · (weight + weight_offset), with h = x or x + residual.

    Args:
        x: `(..., hidden_size)`, fp32, bf16 or fp16; the last dimension contiguous.
        weight: `(hidden_size,)`, any floating dtype.
        residual: same shape and dtype as `x`, or None.
        eps: added to the mean square.
        weight_offset: 1.0 for Gemma, whose checkpoints store weight - 1.

    Returns:
        y in `x`'s dtype; with `residual`, the pair (y, h), h rounded to `x`'s dtype as the next residual.
        Arithmetic is fp32 and is rounded once, at the end. Differentiable once in x, residual and weight.

    Raises:
        ValueError: when shapes or dtypes do not fit.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be ({x.shape[-1]},) for x {tuple(x.shape)}, not {tuple(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be like x, {tuple(x.shape)} {x.dtype}, not {tuple(residual.shape)} {residual.dtype}"
        )
    y, h, _ = _forward(x, weight, residual, eps, weight_offset)
    return y if residual is None else (y, h)


OP = Op("rms_norm", rms_norm, ("triton", "cpu", "reference"))


def _run_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    backend = OP.select(x, weight, residual=residual, eps=eps, weight_offset=weight_offset)
    return backend.forward(x, weight, residual, eps, weight_offset)


def _fake_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), h, rstd


def _run_backward(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float
) -> tuple[Tensor, Tensor]:
    backend = OP.select(h, weight, residual=grad_h, eps=0.0, weight_offset=weight_offset)
    return backend.backward(grad_y, grad_h, h, weight, rstd, weight_offset)


def _fake_backward(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float
) -> tuple[Tensor, Tensor]:
    return torch.empty(h.shape, dtype=h.dtype, device=h.device), torch.empty_like(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_offset: float) -> Any:
        y, h, rstd = _forward(x, weight, residual, eps, weight_offset)
        ctx.save_for_backward(x if residual is None else h, weight, rstd)
        ctx.weight_offset = weight_offset
        ctx.has_residual = residual is not None
        ctx.mark_non_differentiable(rstd) if ctx.has_residual else ctx.mark_non_differentiable(h, rstd)
        ctx.set_materialize_grads(False)
        return y, h, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, _grad_rstd: None) -> Any:
        h, weight, rstd = ctx.saved_tensors
        if grad_y is None:  # only h was used
            return grad_h, None, grad_h, None, None
        grad_x, grad_weight = _backward(grad_y, grad_h, h, weight, rstd, ctx.weight_offset)
        return grad_x, grad_weight, grad_x if ctx.has_residual else None, None, None


_forward = define_op(
    "rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps, float weight_offset) -> (Tensor, Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    _RMSNorm,
)
_backward = define_op(
    "rms_norm_backward(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor rstd, float weight_offset)"
    " -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
