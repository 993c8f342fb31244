"""On the CUDA core: `csrc/cuda/sampling.cu`, temperature and draw without filters, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._core import cuda


def supports(logits: Tensor, *, return_logprobs: bool, num_logprobs: int, **settings: object) -> str | None:
    lacking = [name for name in ("top_k", "top_p", "min_p") if settings.get(name) is not None]
    lacking += [name for name, value in settings.items() if name.endswith("_penalty") and value is not None]
    if num_logprobs:
        lacking.append("num_logprobs")
    return f"has no {', '.join(lacking)}" if lacking else None


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
    ids = torch.empty(batch, dtype=torch.int64, device=logits.device)
    valid = torch.empty(batch, dtype=torch.bool, device=logits.device)
    logprobs = torch.empty(batch if return_logprobs else 0, dtype=torch.float32, device=logits.device)
    processed = torch.empty_like(logprobs)
    temperature, seed, position = temperature.contiguous(), seed.contiguous(), position.contiguous()
    with torch.cuda.device(logits.device):
        cuda().sample(
            str(logits.dtype).removeprefix("torch."),
            logits.data_ptr(),
            batch,
            vocab_size,
            logits.stride(0),
            temperature.data_ptr(),
            seed.data_ptr(),
            position.data_ptr(),
            ids.data_ptr(),
            valid.data_ptr(),
            logprobs.data_ptr(),
            processed.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return ids, valid, logprobs, processed, ids.new_empty(0), logprobs.new_empty(0)
