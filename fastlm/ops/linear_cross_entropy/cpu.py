"""On the CPU: chunks of tokens, matrix products by torch, and between them `csrc/cpu/cross_entropy.cpp`, which makes
loss and gradient of a row of logits while it is in cache. A chunk is a sixteenth of the tokens, and in bf16 an eighth:
its products take a fifth of the time, so that summing the chunks' shares of the weight's gradient counts. Its logits
take a few percent of the memory that the plain version does. The shares are summed in fp32: each was rounded once, and
so was the sum, which makes 1.4 times the error of the plain version's one rounding.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastlm._core import native, native_missing
from fastlm.ops.linear_cross_entropy import chunked, reference

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MIN_CHUNK = 128  # fewer rows than this and the matrix products slow down


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
    if hidden.dtype not in DTYPES:
        return f"supports fp32 and bf16, not {hidden.dtype}"
    return native_missing()


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
    kernel: chunked.Kernel = partial(_kernel, ignore_index, label_smoothing, z_loss, softcap or 0.0)
    if logprob_scale is not None or entropy_scale is not None:
        kernel = partial(_plain_kernel, ignore_index, label_smoothing, z_loss, softcap)
    chunk_size = max(MIN_CHUNK, hidden.shape[0] // (16 if hidden.dtype == torch.float32 else 8))
    scales = (scale, logprob_scale, entropy_scale)
    return chunked.token_losses(
        kernel, chunk_size, torch.float32, hidden, weight, targets, scales, needs_hidden, needs_weight
    )


def _kernel(
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logits: Tensor,
    targets: Tensor,
    scales: chunked.Scales,
    losses: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
) -> None:
    scale = scales[0]
    native().cross_entropy(
        DTYPES[logits.dtype],
        logits.data_ptr(),
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        targets.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        losses.data_ptr(),
        logprobs.data_ptr(),
        entropy.data_ptr(),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        torch.get_num_threads(),
    )


def _plain_kernel(
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logits: Tensor,
    targets: Tensor,
    scales: chunked.Scales,
    losses: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
) -> None:
    x = logits.float()
    tanh = torch.tanh(x / softcap) if softcap is not None else None
    x = x if softcap is None or tanh is None else softcap * tanh
    token = reference.from_logits(x, targets, ignore_index, label_smoothing, z_loss)
    for out, value in zip((losses, logprobs, entropy), token, strict=True):
        out.copy_(value)
    if any(s is not None for s in scales):
        grad = reference.logits_gradient(x, targets, entropy, scales, ignore_index, label_smoothing, z_loss)
        logits.copy_(grad if tanh is None else grad * (1 - tanh * tanh))
