"""The output layer and the draw of the next token, without the (batch, vocab_size) logits ever being whole."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops._library import define_op
from fastlm.ops._registry import Op
from fastlm.ops.sampling import (
    Order,
    Outputs,
    Sample,
    Setting,
    bias_rows,
    check_options,
    checked_mask,
    empty_outputs,
    row_setting,
    to_sample,
    token_ids,
)


def fused_linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor,
    temperature: Setting = 1.0,
    top_k: int | Tensor | None = None,
    top_p: Setting | None = None,
    min_p: Setting | None = None,
    repetition_penalty: Setting | None = None,
    presence_penalty: Setting | None = None,
    frequency_penalty: Setting | None = None,
    prompt_ids: Tensor | None = None,
    output_ids: Tensor | None = None,
    order: Order = "hf",
    softcap: float | None = None,
    return_logprobs: bool = False,
    num_logprobs: int = 0,
    logit_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Sample:
    """sample(softcap · tanh(hidden @ weight.T / softcap), …): the same distribution and, but for the rounding of
    logits, the same tokens, as `sample` gives for the same seed and position.

    Args:
        hidden: `(batch, hidden_size)`, fp32, bf16 or fp16.
        weight: `(vocab_size, hidden_size)`, in hidden's dtype; the last dimension contiguous for the fast backends.
        softcap: bound on the logits' size (30.0 in Gemma 2), or None.
        The others are those of `fastlm.ops.sample`.

    Returns:
        `Sample`. Logits are fp32 and are not rounded to hidden's dtype. No gradient.

    Raises:
        ValueError: when a shape, a dtype or a number does not fit, as `sample` does.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            "hidden and weight must be (batch, hidden_size) and (vocab_size, hidden_size) with vocab_size > 0, "
            f"not {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"hidden and weight must have one dtype, fp32, bf16 or fp16, not {hidden.dtype} and {weight.dtype}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, not {softcap}")
    check_options(weight.shape[0], num_logprobs, order)
    outputs = _fused_linear_sample(
        hidden.detach(),
        weight.detach(),
        row_setting("temperature", temperature, hidden, torch.float32, low=0.0),
        row_setting("top_k", top_k, hidden, torch.int64, low=0),
        row_setting("top_p", top_p, hidden, torch.float32, low=0.0),
        row_setting("min_p", min_p, hidden, torch.float32, low=0.0, high=1.0),
        row_setting("repetition_penalty", repetition_penalty, hidden, torch.float32, above=0.0),
        row_setting("presence_penalty", presence_penalty, hidden, torch.float32),
        row_setting("frequency_penalty", frequency_penalty, hidden, torch.float32),
        token_ids("prompt_ids", prompt_ids, hidden),
        token_ids("output_ids", output_ids, hidden),
        row_setting("seed", seed, hidden, torch.int64),
        row_setting("position", position, hidden, torch.int64),
        order == "vllm",
        softcap,
        return_logprobs,
        num_logprobs,
        bias_rows(logit_bias, hidden.shape[0], weight.shape[0], hidden.device),
        checked_mask(mask, hidden.shape[0], weight.shape[0], hidden.device),
    )
    return to_sample(outputs, return_logprobs, num_logprobs)


OP = Op("fused_linear_sample", fused_linear_sample, ("triton", "cpu", "reference"))


def _run(
    hidden: Tensor, weight: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None,
    min_p: Tensor | None, repetition_penalty: Tensor | None, presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None, prompt_ids: Tensor | None, output_ids: Tensor | None, seed: Tensor,
    position: Tensor, min_p_first: bool, softcap: float | None, return_logprobs: bool, num_logprobs: int,
    logit_bias: Tensor | None = None, mask: Tensor | None = None,
) -> Outputs:  # fmt: skip
    backend = OP.select(
        hidden, weight, seed=seed, position=position, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        prompt_ids=prompt_ids, output_ids=output_ids, order="vllm" if min_p_first else "hf", softcap=softcap,
        return_logprobs=return_logprobs, num_logprobs=num_logprobs, logit_bias=logit_bias, mask=mask,
    )  # fmt: skip
    settings = (
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, prompt_ids,
        output_ids, logit_bias, mask, seed, position,
    )  # fmt: skip
    return backend.fused_linear_sample(hidden, weight, settings, min_p_first, softcap, return_logprobs, num_logprobs)


def _fake(
    hidden: Tensor, weight: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None,
    min_p: Tensor | None, repetition_penalty: Tensor | None, presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None, prompt_ids: Tensor | None, output_ids: Tensor | None, seed: Tensor,
    position: Tensor, min_p_first: bool, softcap: float | None, return_logprobs: bool, num_logprobs: int,
    logit_bias: Tensor | None = None, mask: Tensor | None = None,
) -> Outputs:  # fmt: skip
    return empty_outputs(hidden, return_logprobs, num_logprobs)


_fused_linear_sample = define_op(
    "fused_linear_sample(Tensor hidden, Tensor weight, Tensor temperature, Tensor? top_k, Tensor? top_p, "
    "Tensor? min_p, Tensor? repetition_penalty, Tensor? presence_penalty, Tensor? frequency_penalty, "
    "Tensor? prompt_ids, Tensor? output_ids, Tensor seed, Tensor position, bool min_p_first, float? softcap, "
    "bool return_logprobs, int num_logprobs, Tensor? logit_bias=None, Tensor? mask=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
