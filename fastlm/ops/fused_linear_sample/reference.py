"""The definition: logits in fp32, whole, and sampling's own definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.ops.sampling import reference as sampling


def supports(hidden: Tensor, weight: Tensor, **settings: object) -> str | None:
    return None


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
    logits = hidden.float() @ weight.float().t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    *before, logit_bias, mask, seed, position = settings
    arguments: list[Any] = [
        logits,
        *before,
        seed,
        position,
        min_p_first,
        return_logprobs,
        num_logprobs,
        logit_bias,
        mask,
    ]
    return sampling.sample(*arguments)
