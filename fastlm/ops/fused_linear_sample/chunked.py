"""Chunks of rows: a chunk's logits by torch, in fp32, into memory that every chunk uses again, then `sample`.

The logits take `LOGIT_BYTES`, or one row's where that is more, whatever the batch. In low precision torch's product on
the CPU would round them, so there the weight is widened, a part at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOGIT_BYTES = 64 * 2**20
WIDENED_BYTES = 16 * 2**20  # of the weight, in fp32


def fused_linear_sample(
    hidden: Tensor,
    weight: Tensor,
    settings: tuple[Tensor | None, ...],
    min_p_first: bool,
    softcap: float | None,
    return_logprobs: bool,
    num_logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`settings`: temperature, top_k, top_p, min_p, three penalties, prompt_ids, output_ids, logit_bias, mask, seed,
    position."""
    batch, vocab_size = hidden.shape[0], weight.shape[0]
    chunk = max(LOGIT_BYTES // (4 * vocab_size), 1)
    logits = torch.empty((min(chunk, batch), vocab_size), dtype=torch.float32, device=hidden.device)
    parts = []
    for start in range(0, max(batch, 1), chunk):
        rows = slice(start, start + chunk)
        chunk_hidden = hidden[rows]
        chunk_logits = logits[: chunk_hidden.shape[0]]
        _matmul(chunk_hidden, weight, chunk_logits)
        if softcap is not None:
            chunk_logits.div_(softcap).tanh_().mul_(softcap)
        *before, logit_bias, mask, seed, position = [None if s is None else s[rows] for s in settings]
        options = (min_p_first, return_logprobs, num_logprobs, logit_bias, mask)
        parts.append(torch.ops.fastlm.sampling.default(chunk_logits, *before, seed, position, *options))
    ids, valid, logprobs, processed, top_ids, top_logprobs = (
        tensors[0] if len(parts) == 1 else torch.cat(tensors) for tensors in zip(*parts, strict=True)
    )
    return ids, valid, logprobs, processed, top_ids, top_logprobs


def _matmul(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=logits)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=logits)
    else:
        wide = hidden.float()
        rows = max(WIDENED_BYTES // (4 * max(weight.shape[1], 1)), 1)
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            logits[:, part] = wide @ weight[part].float().t()
