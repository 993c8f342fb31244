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
    losses, logprobs, entropy = from_logits(logits, targets, ignore_index, label_smoothing, z_loss)
    if reduction == "none":
        return losses, logprobs, entropy
    total = losses.sum()
    return total / (targets != ignore_index).sum() if reduction == "mean" else total, logprobs, entropy


def from_logits(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss, log-probability and entropy, of capped logits `(..., vocab_size)`."""
    kept = targets != ignore_index
    lse = logits.logsumexp(-1)
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(-1, torch.where(kept, targets, 0)[..., None]).squeeze(-1)
    smoothing = lse - logits.mean(-1)
    losses = z_loss * lse.square() + label_smoothing * smoothing - (1 - label_smoothing) * logprobs
    highest = log_p.detach().amax(-1, keepdim=True)  # Σ p = 1: subtracting it changes nothing but the rounding
    entropy = -(log_p.exp() * (log_p - highest)).sum(-1) - highest.squeeze(-1)
    losses, logprobs, entropy = (torch.where(kept, t, 0) for t in (losses, logprobs, entropy))
    return losses, logprobs, entropy


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    logprob_scale: Tensor | None,
    entropy_scale: Tensor | None,
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
    scales = (scale, logprob_scale, entropy_scale)
    if any(s is not None for s in scales) and (needs_hidden or needs_weight):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(wide) @ weight.to(wide).t()
        tanh = torch.tanh(logits / softcap) if softcap is not None else None
        logits = logits if softcap is None or tanh is None else softcap * tanh
        grad = logits_gradient(logits, targets, entropy, scales, ignore_index, label_smoothing, z_loss)
        if tanh is not None:
            grad *= 1 - tanh * tanh
        if needs_hidden:
            grad_hidden = (grad @ weight.to(wide)).to(hidden.dtype)
        if needs_weight:
            grad_weight = (grad.t() @ hidden.to(wide)).to(weight.dtype).contiguous()
    return losses, logprobs, entropy, grad_hidden, grad_weight


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    scales: tuple[Tensor | None, Tensor | None, Tensor | None],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Gradient in the capped logits `(tokens, vocab_size)` of a sum of the losses, the log-probabilities and the
    entropies, each token's weighted by `scales`: with p the softmax and H the entropy,

        d loss = p (1 + 2 z lse) - ε / vocab_size - (1 - ε) onehot,  d logprob = onehot - p,  d H = -p (log p + H).
    """
    kept = targets != ignore_index
    zero = torch.zeros_like(entropy)
    scale, logprob_scale, entropy_scale = (zero if s is None else s.to(zero.dtype) for s in scales)
    lse = logits.logsumexp(-1, keepdim=True)
    log_p = logits.log_softmax(-1)
    grad = (scale - logprob_scale)[:, None] + (2 * z_loss * scale)[:, None] * lse
    grad = grad - entropy_scale[:, None] * (log_p + entropy[:, None])
    grad = grad * log_p.exp() - (scale * label_smoothing / logits.shape[-1])[:, None]
    at_target = logprob_scale - scale * (1 - label_smoothing)
    grad.scatter_add_(-1, torch.where(kept, targets, 0)[:, None], at_target[:, None])
    return torch.where(kept[:, None], grad, 0)
