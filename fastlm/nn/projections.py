"""Linear layers in training. What the norm before them gives is made again on the way back instead of being kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlm.nn.normalization import RMSNorm
from fastlm.ops import _products, rms_norm


def can_recompute(norm: nn.Module | None, *layers: nn.Module) -> bool:
    """Whether gradients are wanted, and the norm and the layers are the plain ones that `norm_and_project` knows."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and isinstance(norm, RMSNorm)
        and all(type(layer) is nn.Linear and layer.bias is None for layer in layers)
    )


def norm_and_project(
    norm: RMSNorm, x: Tensor, residual: Tensor | None, *layers: nn.Linear
) -> tuple[tuple[Tensor, ...], Tensor]:
    """y, h = norm(x, residual); returns (each layer's output of y, h). Without a residual h is x.

    y is half of what norm and layers would keep; making it again is one pass over memory.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    weights = [layer.weight.to(dtype) for layer in layers]
    h, *outs = _NormAndProject.apply(x, residual, norm.weight, norm.eps, norm.weight_offset, *weights)
    return tuple(outs), x if residual is None else h


class _NormAndProject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, scale: Tensor, eps: float, offset: float, *weights: Tensor
    ) -> Any:
        both = rms_norm(x, scale, residual=residual, eps=eps, weight_offset=offset)
        y, h = both if isinstance(both, tuple) else (both, x.new_empty(0))
        ctx.has_residual, ctx.eps, ctx.offset = residual is not None, eps, offset
        ctx.save_for_backward(h if ctx.has_residual else x, scale, *weights)
        ctx.set_materialize_grads(False)
        if not ctx.has_residual:
            ctx.mark_non_differentiable(h)
        return h, *(_products.linear(y.to(weight.dtype), weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, *grads: Tensor | None) -> Any:
        h, scale, *weights = ctx.saved_tensors
        y, _, rstd = torch.ops.fastlm.rms_norm(h, scale, None, ctx.eps, ctx.offset)
        rows = y.flatten(0, -2).to(weights[0].dtype)
        grad_rows: Tensor | None = None
        grad_weights: list[Tensor | None] = []
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            if grad is None:
                grad_weights.append(None)
                continue
            grad = grad.flatten(0, -2)
            grad_weights.append(_products.weight_gradient(grad, rows) if ctx.needs_input_grad[5 + i] else None)
            grad_rows = _products.add_input_gradient(grad_rows, grad, weight)
        if grad_rows is None:
            return grad_h, grad_h, *(None,) * (3 + len(weights))
        grad_y = grad_rows.view(h.shape).to(h.dtype)
        grad_x, grad_scale = torch.ops.fastlm.rms_norm_backward(grad_y, grad_h, h, scale, rstd, ctx.offset)
        grad_residual = grad_x if ctx.has_residual else None
        return grad_x, grad_residual, grad_scale, None, None, *grad_weights


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x); of a plain linear layer that learns, by the faster of torch's products."""
    learns = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not learns or type(layer) is not nn.Linear or layer.bias is not None:
        out: Tensor = layer(x)
        return out
    if not _products.prefers_onednn(x.dtype, x.device) or torch.is_autocast_enabled(x.device.type):
        return layer(x)
    out = _Project.apply(x, layer.weight)
    return out


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _products.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = _products.input_gradient(grad, weight) if needs_x else None
        grad_weight = _products.weight_gradient(grad.flatten(0, -2), x.flatten(0, -2)) if needs_weight else None
        return grad_x, grad_weight
