"""On the CUDA core: `csrc/cuda/sampling.cu`, everything but penalties and the most probable tokens, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._core import cuda
from fastlm.ops._cuda import not_built_for


def supports(logits: Tensor, *, num_logprobs: int, **settings: object) -> str | None:
    served = ("seed", "position", "temperature", "top_k", "top_p", "min_p", "order", "return_logprobs")
    ids = ("prompt_ids", "output_ids")  # of penalties, without which they mean nothing
    lacking = [name for name, value in settings.items() if name not in (*served, *ids) and value is not None]
    if num_logprobs:
        lacking.append("num_logprobs")
    if lacking:
        return f"has no {', '.join(lacking)}"
    if logits.shape[1] > 2**30:
        return f"supports vocabularies up to 2^30, not {logits.shape[1]}"
    return not_built_for(logits.device) if logits.is_cuda else None


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
    logit_bias: None = None,
    mask: None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, vocab_size = logits.shape
    ids = torch.empty(batch, dtype=torch.int64, device=logits.device)
    valid = torch.empty(batch, dtype=torch.bool, device=logits.device)
    logprobs = torch.empty(batch if return_logprobs else 0, dtype=torch.float32, device=logits.device)
    processed = torch.empty_like(logprobs)
    settings = [None if s is None else s.contiguous() for s in (temperature, top_k, top_p, min_p)]
    seed, position = seed.contiguous(), position.contiguous()
    with torch.cuda.device(logits.device):
        cuda().sample(
            str(logits.dtype).removeprefix("torch."),
            logits.data_ptr(),
            batch,
            vocab_size,
            logits.stride(0),
            *(0 if s is None else s.data_ptr() for s in settings),
            min_p_first,
            seed.data_ptr(),
            position.data_ptr(),
            ids.data_ptr(),
            valid.data_ptr(),
            logprobs.data_ptr(),
            processed.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return ids, valid, logprobs, processed, ids.new_empty(0), logprobs.new_empty(0)
