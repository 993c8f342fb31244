"""On the CPU: `csrc/cpu/sampling.cpp` sorts nothing but a few candidates and copies nothing of the logits save blocks
that penalties touch. What it reads, and how it filters, is told there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm._core import native, native_missing


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, vocab_size = logits.shape
    ids = torch.empty(batch, dtype=torch.int64)
    valid = torch.empty(batch, dtype=torch.bool)
    logprobs, processed = torch.empty((2, batch if return_logprobs else 0), dtype=torch.float32).unbind()
    top = (batch, num_logprobs) if num_logprobs else (0,)
    top_ids, top_logprobs = torch.empty(top, dtype=torch.int64), torch.empty(top, dtype=torch.float32)
    settings = [temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty]
    settings = [t if t is None else t.contiguous() for t in settings]
    prompt_ids, output_ids = (t if t is None else t.contiguous() for t in (prompt_ids, output_ids))
    seed, position = seed.contiguous(), position.contiguous()
    draw = getattr(native(), f"sample_{str(logits.dtype).removeprefix('torch.')}")
    draw(
        logits.data_ptr(),
        batch,
        vocab_size,
        logits.stride(0),
        *map(_address, settings),
        _address(prompt_ids),
        0 if prompt_ids is None else prompt_ids.shape[1],
        _address(output_ids),
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


def _address(tensor: Tensor | None) -> int:
    """0 for a tensor that was not given or is empty."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()
