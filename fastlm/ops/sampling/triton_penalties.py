"""Penalties in Triton. Occurrences are counted by integer atomics, whose order does not show, into a buffer of 4 bytes
a logit, which one elementwise kernel then turns into the penalized logits in place: three small launches that move
about 16 bytes a logit, before the sampling kernel, and only when a call has penalties and ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

IN_PROMPT = tl.constexpr(1 << 30)  # bit of a count that marks a token of the prompt
BLOCK = 1024


@triton.jit
def _count_kernel(
    ids_ptr, counts_ptr, row_stride, id_stride, length, vocab_size, PROMPT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row * row_stride + columns * id_stride, columns < length, -1)
    inside = (ids >= 0) & (ids < vocab_size)
    ptrs = counts_ptr + row * vocab_size + tl.where(inside, ids, 0)
    if PROMPT:
        tl.atomic_or(ptrs, tl.full((BLOCK,), IN_PROMPT, tl.int32), inside, sem="relaxed")
    else:
        tl.atomic_add(ptrs, tl.full((BLOCK,), 1, tl.int32), inside, sem="relaxed")


@triton.jit
def _penalize_kernel(
    logits_ptr, counts_ptr, repetition_ptr, presence_ptr, frequency_ptr, bias_ptr, mask_ptr,
    row_stride, bias_stride, mask_stride, vocab_size, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    x = tl.load(logits_ptr + row * row_stride + columns, inside).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + row * bias_stride + columns, inside, 0.0)
    if mask_ptr is not None:
        words = tl.load(mask_ptr + row * mask_stride + columns // 32, inside, 0)
        x = tl.where((words >> (columns % 32)) & 1 == 1, x, float("-inf"))
    ptrs = counts_ptr + row * vocab_size + columns
    seen = tl.load(ptrs, inside, 0)
    count = seen & (IN_PROMPT - 1)
    if repetition_ptr is not None:
        factor = tl.load(repetition_ptr + row)
        x = tl.where(seen != 0, tl.where(x > 0, tl.div_rn(x, tl.broadcast_to(factor, (BLOCK,))), x * factor), x)
    if frequency_ptr is not None:
        x = tl.where(count > 0, x - tl.load(frequency_ptr + row) * count.to(tl.float32), x)
    if presence_ptr is not None:
        x = tl.where(count > 0, x - tl.load(presence_ptr + row), x)
    tl.store(ptrs, x.to(tl.int32, bitcast=True), inside)


def penalized(
    logits: Tensor,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    prompt_ids: Tensor | None,
    output_ids: Tensor | None,
    logit_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The logits after bias, mask and penalties, fp32 and contiguous."""
    batch, vocab_size = logits.shape
    counts = torch.zeros((batch, vocab_size), dtype=torch.int32, device=logits.device)
    for ids, is_prompt in ((prompt_ids, True), (output_ids, False)):
        if ids is not None and ids.shape[1] > 0:
            _count_kernel[(batch, triton.cdiv(ids.shape[1], BLOCK))](
                ids, counts, ids.stride(0), ids.stride(1), ids.shape[1], vocab_size, PROMPT=is_prompt, BLOCK=BLOCK
            )
    # Without contraction to multiply-add, so that results have the bits of the definition.
    _penalize_kernel[(batch, triton.cdiv(vocab_size, BLOCK))](
        logits, counts, repetition, presence, frequency, logit_bias, mask, logits.stride(0),
        0 if logit_bias is None else logit_bias.stride(0), 0 if mask is None else mask.stride(0), vocab_size,
        BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return counts.view(torch.float32)
