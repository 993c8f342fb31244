"""On the CPU: `csrc/cpu/sampling.cpp` sorts nothing but a few candidates and copies nothing of the logits save blocks
that penalties touch. What it reads, and how it filters, is told there. Bias and mask are applied before it by torch,
to a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm._core import native, native_missing
from fastlm.ops.sampling import reference

DRAW = {torch.float32: "sample_float32", torch.bfloat16: "sample_bfloat16", torch.float16: "sample_float16"}


def supports(logits: Tensor, **settings: Any) -> str | None:
    if logits.shape[1] >= 2**31:
        return f"supports vocabularies under 2^31, not {logits.shape[1]}"
    return native_missing()


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition_penalty: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    prompt_ids: Tensor | None,
    output_ids: Tensor | None,
    seed: Tensor,
    position: Tensor,
    min_p_first: bool,
    return_logprobs: bool,
    num_logprobs: int,
    logit_bias: Tensor | None = None,
    mask: Tensor | None = None,
    typical_p: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if logit_bias is not None or mask is not None:
        raw = logits.float()
        settings = (temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)
        ids, valid, _, processed, _, _ = sample(
            reference.adjusted(raw, logit_bias, mask), *settings, prompt_ids, output_ids, seed, position, min_p_first,
            return_logprobs, 0, typical_p=typical_p,
        )  # fmt: skip
        logprobs, top_ids, top_logprobs = reference.raw_logprobs(raw, ids, valid, return_logprobs, num_logprobs)
        return ids, valid, logprobs, processed, top_ids, top_logprobs
    batch, vocab_size = logits.shape
    ids = torch.empty(batch, dtype=torch.int64)
    valid = torch.empty(batch, dtype=torch.bool)
    wanted = batch if return_logprobs else 0
    logprobs, processed = torch.empty(wanted, dtype=torch.float32), torch.empty(wanted, dtype=torch.float32)
    top = (batch, num_logprobs) if num_logprobs else (0,)
    top_ids, top_logprobs = torch.empty(top, dtype=torch.int64), torch.empty(top, dtype=torch.float32)
    pointers = [
        t if t is None or t.is_contiguous() else t.contiguous()
        for t in (
            temperature,
            top_k,
            top_p,
            min_p,
            typical_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            prompt_ids,
            output_ids,
        )
    ]
    seed, position = seed.contiguous(), position.contiguous()
    getattr(native(), DRAW[logits.dtype])(
        logits.data_ptr(),
        batch,
        vocab_size,
        logits.stride(0),
        *[0 if t is None else t.data_ptr() for t in pointers],
        0 if prompt_ids is None else prompt_ids.shape[1],
        0 if output_ids is None else output_ids.shape[1],
        seed.data_ptr(),
        position.data_ptr(),
        min_p_first,
        ids.data_ptr(),
        valid.data_ptr(),
        logprobs.data_ptr(),
        processed.data_ptr(),
        top_ids.data_ptr(),
        top_logprobs.data_ptr(),
        num_logprobs,
        torch.get_num_threads(),
    )
    return ids, valid, logprobs, processed, top_ids, top_logprobs
