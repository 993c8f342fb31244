"""On a GPU: chunks of tokens, matrix products by torch, and between them one Triton kernel. A program takes one row of
logits: a first pass keeps the running maximum, normaliser and entropy sum (online softmax, arXiv 1805.02867), a second
writes the gradient over the logits. The row (256 KB in bf16 at a vocabulary of 128k) is still in L2 for the second, so
memory sees one read and one write of each logit. No atomics: results are the same at every run.

At most 4 chunks, of at least 1024 rows, below which the products would wait for the weight's bytes. So a
low-precision weight gradient is rounded 4 times at most, with 1.6 times the error of one rounding, and the logits take
a quarter of one (tokens, vocab_size) tensor, of which the plain version holds three.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.linear_cross_entropy import chunked

BLOCK = 1024  # logits of a row at once: 4 for each of 256 threads, 64 registers, so eight rows fit a multiprocessor
MIN_CHUNK = 1024
MAX_CHUNKS = 4


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
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"supports fp32, bf16 and fp16, not {hidden.dtype}"
    return None


@triton.jit
def _tanh(x):
    """The hyperbolic tangent and its slope. Near 0, where the exponential form cancels, by its Taylor series; the slope
    from t = exp(-2|x|), because 1 - tanh² has no digits left far from 0."""
    squared = x * x
    series = x + x * squared * (-0.33333333 + squared * (0.13333333 + squared * (-0.05396825 + squared * 0.02186949)))
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(squared < 0.0625, series, tl.where(x < 0.0, -far, far)), 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def _kernel(
    logits_ptr, targets_ptr, scale_ptr, logprob_scale_ptr, entropy_scale_ptr, losses_ptr, logprobs_ptr, entropy_ptr,
    stride, vocab_size, ignore_index, label_smoothing, z_loss, softcap,
    HAS_SCALE: tl.constexpr, HAS_LOGPROB_SCALE: tl.constexpr, HAS_ENTROPY_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        if HAS_SCALE or HAS_LOGPROB_SCALE or HAS_ENTROPY_SCALE:
            for start in range(0, vocab_size, BLOCK):
                mask = start + columns < vocab_size
                tl.store(logits_ptr + start + columns, tl.zeros((BLOCK,), logits_ptr.dtype.element_ty), mask)
    else:
        in_range = (target >= 0) & (target < vocab_size)
        target_logit = tl.load(logits_ptr + target, in_range, float("nan")).to(tl.float32)
        if HAS_SOFTCAP:
            target_logit = softcap * _tanh(target_logit / softcap)[0]
        peak = tl.full((), -1e30, tl.float32)
        exp_sum = tl.zeros((BLOCK,), tl.float32)
        weighted_sum = tl.zeros((BLOCK,), tl.float32)  # of exp(x - peak) · (x - peak)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            mask = start + columns < vocab_size
            x = tl.load(logits_ptr + start + columns, mask, 0.0).to(tl.float32)
            if HAS_SOFTCAP:
                x = softcap * _tanh(x / softcap)[0]
            total += tl.where(mask, x, 0.0)
            new_peak = tl.maximum(peak, tl.max(tl.where(mask, x, -1e30)))
            shrink = tl.exp(peak - new_peak)
            weighted_sum = (weighted_sum + exp_sum * (peak - new_peak)) * shrink
            peak = new_peak
            e = tl.where(mask, tl.exp(x - peak), 0.0)
            exp_sum = exp_sum * shrink + e
            weighted_sum += tl.where(mask, e * (x - peak), 0.0)
        normalizer = tl.sum(exp_sum)
        log_normalizer = tl.log(normalizer)
        lse = peak + log_normalizer
        logprob = (target_logit - peak) - log_normalizer
        mean = tl.sum(total) / vocab_size
        loss = -(1.0 - label_smoothing) * logprob + label_smoothing * (lse - mean) + z_loss * lse * lse
        tl.store(losses_ptr + row, loss)
        tl.store(logprobs_ptr + row, logprob)
        entropy = log_normalizer - tl.sum(weighted_sum) / normalizer
        tl.store(entropy_ptr + row, entropy)
        if HAS_SCALE or HAS_LOGPROB_SCALE or HAS_ENTROPY_SCALE:
            factor = tl.where(in_range, 0.0, float("nan"))  # of the softmax
            uniform = 0.0
            at_target = 0.0
            if HAS_SCALE:
                scale = tl.load(scale_ptr + row)
                factor += scale * (1.0 + 2.0 * z_loss * lse)
                uniform = scale * label_smoothing / vocab_size
                at_target = scale * (1.0 - label_smoothing)
            if HAS_LOGPROB_SCALE:
                logprob_scale = tl.load(logprob_scale_ptr + row)
                factor -= logprob_scale
                at_target -= logprob_scale
            factor /= normalizer
            if HAS_ENTROPY_SCALE:
                entropy_factor = tl.load(entropy_scale_ptr + row) / normalizer
            for start in range(0, vocab_size, BLOCK):
                mask = start + columns < vocab_size
                x = tl.load(logits_ptr + start + columns, mask, 0.0).to(tl.float32)
                slope = 1.0
                if HAS_SOFTCAP:
                    tanh, slope = _tanh(x / softcap)
                    x = softcap * tanh
                share = factor
                if HAS_ENTROPY_SCALE:
                    share = factor - entropy_factor * ((x - peak) - (log_normalizer - entropy))
                gradient = tl.exp(x - peak) * share - uniform
                gradient -= tl.where(start + columns == target, at_target, 0.0)
                tl.store(logits_ptr + start + columns, gradient * slope, mask)


def _launch(
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
    has_scale, has_logprob_scale, has_entropy_scale = (s is not None for s in scales)
    _kernel[(logits.shape[0],)](
        logits, targets, *(losses if s is None else s for s in scales), losses, logprobs, entropy,
        logits.stride(0), logits.shape[1], ignore_index, label_smoothing, z_loss, 1.0 if softcap is None else softcap,
        HAS_SCALE=has_scale, HAS_LOGPROB_SCALE=has_logprob_scale, HAS_ENTROPY_SCALE=has_entropy_scale,
        HAS_SOFTCAP=softcap is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


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
    kernel = partial(_launch, ignore_index, label_smoothing, z_loss, softcap)
    chunk_size = max(MIN_CHUNK, triton.cdiv(hidden.shape[0], MAX_CHUNKS))
    scales = (scale, logprob_scale, entropy_scale)
    return chunked.token_losses(
        kernel, chunk_size, weight.dtype, hidden, weight, targets, scales, needs_hidden, needs_weight
    )
