"""Cross-entropy of a language model's last linear layer, without the (tokens, vocab_size) logits ever being whole."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlm.errors import DataError
from fastlm.ops._library import define_op
from fastlm.ops._registry import Op

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """cross_entropy(softcap · tanh(hidden @ weight.T / softcap), targets) + z_loss · logsumexp².

    Args:
        hidden: `(..., hidden_size)`, fp32, bf16 or fp16. Under autocast, cast as `torch.nn.functional.linear` would.
        weight: `(vocab_size, hidden_size)`, in `hidden`'s dtype.
        targets: `(...)`, int64. Those equal to `ignore_index` count for nothing and give no gradient.
        label_smoothing: ε in [0, 1); the target distribution is (1 - ε) · one-hot + ε / vocab_size.
        z_loss: weight of the squared log of the softmax's normaliser (1e-4 in PaLM).
        softcap: bound on the logits' size (30.0 in Gemma 2), or None.
        reduction: "mean" over the targets that are not ignored (NaN with zero gradients when all are, as torch gives),
            "sum", or "none".
        return_metrics: also return, for each target, its log-probability and the entropy of its distribution, in nats.
            Both are differentiable, as policy gradients need; a backward through them makes the logits again.

    Returns:
        The loss in nats, fp32: a scalar, or `targets`' shape for "none". With `return_metrics` the triple
        (loss, logprobs, entropy); logprobs and entropy have `targets`' shape, are fp32, and are 0 where ignored. All
        three are differentiable once in hidden and weight.

    Raises:
        ValueError: when shapes, dtypes or options do not fit.
        DataError: on the CPU, when a target is neither `ignore_index` nor in [0, vocab_size). A GPU does not wait to
            look: there the loss of such a token is NaN.

    Szegedy et al., arXiv 1512.00567, section 7 (label smoothing); Chowdhery et al., "PaLM", arXiv 2204.02311, section 5
    (z-loss); Gemma 2, arXiv 2408.00118, section 2 (softcap).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must be (vocab_size, hidden_size) for hidden {tuple(hidden.shape)}, not {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"hidden and weight must have one dtype, not {hidden.dtype} and {weight.dtype}")
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 {tuple(hidden.shape[:-1])}, not {targets.dtype} {tuple(targets.shape)}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, not {softcap}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    outputs = _loss(hidden, weight, targets, ignore_index, label_smoothing, z_loss, softcap, reduction, return_metrics)
    return outputs if return_metrics else outputs[0]


OP = Op("linear_cross_entropy", linear_cross_entropy, ("triton", "cpu", "reference"))


def _run_token_losses(
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
    """For hidden `(tokens, hidden_size)`: each token's loss, log-probability and entropy. With the scales, each token's
    weights in a sum of these three, also that sum's gradients in hidden and weight, those that are needed."""
    if targets.device.type == "cpu":
        _check_targets(targets, weight.shape[0], ignore_index)
    backend = OP.select(
        hidden,
        weight,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction="none",
        return_metrics=True,
    )
    return backend.token_losses(
        hidden, weight, targets, scale, logprob_scale, entropy_scale, ignore_index, label_smoothing, z_loss, softcap,
        needs_hidden, needs_weight,
    )  # fmt: skip


def _check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    wrong = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise DataError(
            f"target {int(targets[at])} (token {at}) is neither ignore_index={ignore_index} nor in [0, {vocab_size})"
        )


def _fake_token_losses(
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
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses, logprobs, entropy = (torch.empty(targets.shape, dtype=dtype, device=hidden.device) for _ in range(3))
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else (0,))
    return losses, logprobs, entropy, grad_hidden, weight.new_empty(weight.shape if needs_weight else (0,))


def _run_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    metrics: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = (ignore_index, label_smoothing, z_loss, softcap)
    flat = targets.reshape(-1)
    losses, logprobs, entropy, _, _ = _token_losses(
        hidden.reshape(-1, hidden.shape[-1]), weight, flat, None, None, None, *settings, False, False
    )
    loss = _reduce(losses, _count(flat, ignore_index), reduction, targets)
    return loss, logprobs.view(targets.shape), entropy.view(targets.shape)


def _count(targets: Tensor, ignore_index: int) -> Tensor:
    return (targets != ignore_index).sum()


def _reduce(losses: Tensor, count: Tensor, reduction: str, targets: Tensor) -> Tensor:
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / count if reduction == "mean" else losses.sum()


def _fake_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    metrics: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    shapes = (targets.shape if reduction == "none" else (), targets.shape, targets.shape)
    loss, logprobs, entropy = (torch.empty(shape, dtype=dtype, device=hidden.device) for shape in shapes)
    return loss, logprobs, entropy


class _LinearCrossEntropy(torch.autograd.Function):
    """For "mean" and "sum" every token's weight in the loss is known in the forward, up to one factor, so the gradients
    are made there, while a tile of logits is at hand, and the backward multiplies by that factor. For "none" the
    backward makes the logits again. So it does for fp16, whose gradients would fall below its range unless they are
    rounded after the loss scaling that arrives with the backward; and where gradients arrive through the
    log-probabilities or the entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        reduction: str,
        metrics: bool = False,
    ) -> Any:
        flat = targets.reshape(-1)
        rows = hidden.reshape(-1, hidden.shape[-1])
        settings = (ignore_index, label_smoothing, z_loss, softcap)
        count = _count(flat, ignore_index)
        needs = ctx.needs_input_grad[:2]
        recompute = reduction == "none" or hidden.dtype == torch.float16
        scale = None
        if not recompute:
            ones = torch.ones_like(flat, dtype=torch.promote_types(hidden.dtype, torch.float32))
            scale = ones / count if reduction == "mean" else ones
        losses, logprobs, entropy, grad_hidden, grad_weight = _token_losses(
            rows, weight, flat, scale, None, None, *settings, needs[0] and not recompute, needs[1] and not recompute
        )
        inputs = (rows, weight, flat, count) if recompute or metrics else (None,) * 4
        ctx.save_for_backward(*inputs, *((None, None) if recompute else (grad_hidden, grad_weight)))
        ctx.settings, ctx.needs, ctx.recompute = settings, needs, recompute
        ctx.reduction, ctx.hidden_shape = reduction, hidden.shape
        ctx.set_materialize_grads(False)
        logprobs, entropy = logprobs.view(targets.shape), entropy.view(targets.shape)
        if not metrics:
            ctx.mark_non_differentiable(logprobs, entropy)
        return _reduce(losses, count, reduction, targets), logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        if grad_loss is None and grad_logprobs is None and grad_entropy is None:
            return (None,) * 9
        rows, weight, targets, count, grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.recompute or grad_logprobs is not None or grad_entropy is not None:
            scale = grad_loss
            if scale is not None and ctx.reduction == "mean":
                scale = scale / count
            scales = (None if s is None else s.expand(targets.shape) if s.dim() == 0 else s.reshape(-1)
                      for s in (scale, grad_logprobs, grad_entropy))  # fmt: skip
            grad_hidden, grad_weight = _token_losses(rows, weight, targets, *scales, *ctx.settings, *ctx.needs)[3:]
        else:
            grad_hidden, grad_weight = (
                grad * grad_loss if needed else grad
                for grad, needed in zip((grad_hidden, grad_weight), ctx.needs, strict=True)
            )
        return (
            grad_hidden.view(ctx.hidden_shape) if ctx.needs[0] else None,
            grad_weight if ctx.needs[1] else None,
            *(None,) * 7,
        )


_token_losses = define_op(
    "linear_cross_entropy_token_losses(Tensor hidden, Tensor weight, Tensor targets, Tensor? scale,"
    " Tensor? logprob_scale, Tensor? entropy_scale, int ignore_index, float label_smoothing, float z_loss,"
    " float? softcap, bool needs_hidden, bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_token_losses,
    _fake_token_losses,
)
_loss = define_op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, float label_smoothing,"
    " float z_loss, float? softcap, str reduction, bool metrics=False) -> (Tensor, Tensor, Tensor)",
    _run_loss,
    _fake_loss,
    _LinearCrossEntropy,
)
