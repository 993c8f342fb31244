"""The definition, in plain torch, with its logits whole."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    return_metrics: bool,
) -> str | None:
    return None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, logprobs, entropy); differentiable by autograd. Computes in fp32, or fp64 for fp64 input."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = targets != ignore_index
    lse = logits.logsumexp(-1)
    target_logit = logits.gather(-1, torch.where(kept, targets, 0)[..., None]).squeeze(-1)
    losses = lse - (1 - label_smoothing) * target_logit - label_smoothing * logits.mean(-1) + z_loss * lse.square()
    losses = torch.where(kept, losses, 0)
    logprobs = torch.where(kept, target_logit - lse, 0)
    probabilities = (logits - lse[..., None]).exp()
    entropy = torch.where(kept, lse - (probabilities * logits).sum(-1), 0)
    if reduction == "none":
        return losses, logprobs, entropy
    total = losses.sum()
    return total / kept.sum() if reduction == "mean" else total, logprobs, entropy


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    losses, logprobs, entropy = linear_cross_entropy(
        hidden,
        weight,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction="none",
    )
    grad_hidden, grad_weight = hidden.new_empty(0), weight.new_empty(0)
    if scale is not None and (needs_hidden or needs_weight):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(wide) @ weight.to(wide).t()
        tanh = torch.tanh(logits / softcap) if softcap is not None else None
        logits = logits if softcap is None or tanh is None else softcap * tanh
        kept = (targets != ignore_index)[:, None]
        lse = logits.logsumexp(-1, keepdim=True)
        grad = (logits - lse).exp() * (1 + 2 * z_loss * lse) - label_smoothing / logits.shape[-1]
        grad.scatter_add_(-1, torch.where(kept, targets[:, None], 0), torch.full_like(lse, label_smoothing - 1))
        if tanh is not None:
            grad *= 1 - tanh * tanh
        grad = torch.where(kept, grad * scale[:, None], 0)
        if needs_hidden:
            grad_hidden = (grad @ weight.to(wide)).to(hidden.dtype)
        if needs_weight:
            grad_weight = (grad.t() @ hidden.to(wide)).to(weight.dtype).contiguous()
    return losses, logprobs, entropy, grad_hidden, grad_weight
