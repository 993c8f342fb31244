"""Drawing the next token: penalties, temperature, filters and the draw, in one pass over the logits."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastlm.ops._library import define_op
from fastlm.ops._registry import Op

Setting = float | Tensor
Order = Literal["hf", "vllm"]


class Sample(NamedTuple):
    """What `sample` returns, a row for each row of logits.

    ids: `(batch,)` int64, the drawn tokens; 0 where `valid` is false.
    valid: `(batch,)` bool, false where nothing could be drawn: the row's logits, after penalties, hold NaN or +inf or
        are all -inf, or one of its settings is NaN or out of range.
    logprobs: `(batch,)` fp32, log-probability of the drawn token in softmax(logits), as the model gave them; None
        without `return_logprobs`.
    processed_logprobs: the same in the distribution that was drawn from: after penalties, temperature and filters. 0
        at temperature 0.
    top_ids, top_logprobs: `(batch, num_logprobs)` int64 and fp32, the most probable tokens of softmax(logits), most
        probable first, ties by id; None without `num_logprobs`. All log-probabilities of an invalid row are NaN, and
        its top ids 0.
    """

    ids: Tensor
    valid: Tensor
    logprobs: Tensor | None = None
    processed_logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


def sample(
    logits: Tensor,
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
    return_logprobs: bool = False,
    num_logprobs: int = 0,
    logit_bias: Tensor | None = None,
    mask: Tensor | None = None,
    typical_p: Setting | None = None,
) -> Sample:
    """Draws one token of each row. A row's draw depends on its logits, settings, seed and position alone.

    Steps, on fp32 logits:

    0. Bias and mask. `logit_bias` is added, and a token whose bit in `mask` is 0 becomes -inf.
    1. Penalties. A token of the prompt or the output has its logit divided (where positive) or multiplied (where
       negative) by `repetition_penalty` (Keskar et al., "CTRL", 2019, section 4.1). Then, for tokens of the output
       alone, `frequency_penalty` · (times it occurs) + `presence_penalty` is subtracted, as OpenAI's API defines them.
    2. Temperature. x = (logits - max) / temperature, weights w = exp(x). At 0, the largest logit is taken, the lowest
       id among equals, and the filters do not matter.
    3. Filters, each of which keeps the tokens above a threshold, so equal logits are kept or dropped together and the
       largest is always kept:
       `top_k` keeps logits not below the k-th largest (Fan et al. 2018); 0, or k >= vocab_size, keeps all.
       `top_p` keeps a token when the weights strictly above it sum to less than top_p of all (Holtzman et al. 2020);
       1 or more keeps all. "All" are the tokens that top_k keeps and, when `order` is "vllm", that min_p keeps too.
       `min_p` keeps w >= min_p, w being 1 for the largest (Nguyen et al. 2024); 0 keeps all.
       "hf" applies top_k, top_p, min_p in this order, as transformers does; "vllm" min_p, top_k, top_p.
       `typical_p`, last, keeps the tokens whose surprise -log p is nearest to the entropy of what is left, the fewest
       that sum to typical_p of it, equals together (Meister et al. 2023, equation 10); 1 or more keeps all. It alone
       may drop the largest logit.
    4. The draw. u in [0, 1) has 53 random bits: Philox4x32-10 (Salmon et al. 2011) with key (seed's low word, its high
       word) and counter (position's low word, its high word, 0, 0); the first two words are the bits, most significant
       first. The token is the first in the order of ids at which the running sum of kept weights exceeds u · their sum.

    Args:
        logits: `(batch, vocab_size)`, fp32, bf16 or fp16; the last dimension contiguous. Not changed.
        seed, position: int or `(batch,)` int64. The position must differ at each step of a sequence.
        temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: a number, or `(batch,)`
            fp32.
        top_k: int, or `(batch,)` int64.
        prompt_ids, output_ids: `(batch, n)` int64, the tokens that penalties look at; ids outside the vocabulary, such
            as -1, are padding. A penalty without them does nothing.
        return_logprobs: also return log-probabilities of the drawn tokens.
        num_logprobs: how many of the most probable tokens to return, at most vocab_size.
        logit_bias: fp32, `(vocab_size,)` or `(batch, vocab_size)`.
        mask: `(batch, ceil(vocab_size / 32))` int32, a bit a token, the lowest of a word first: 1 where it is allowed,
            as grammar engines give it.
        typical_p: a number, or `(batch,)` fp32.

    Returns:
        `Sample`. No gradient.

    Raises:
        ValueError: when a shape, a dtype or a number does not fit. The values inside tensors are not looked at: rows in
            which they are out of range come back invalid.
    """
    _check_logits(logits, num_logprobs, order)
    outputs = _sample(
        logits.detach(),
        row_setting("temperature", temperature, logits, torch.float32, low=0.0),
        row_setting("top_k", top_k, logits, torch.int64, low=0),
        row_setting("top_p", top_p, logits, torch.float32, low=0.0),
        row_setting("min_p", min_p, logits, torch.float32, low=0.0, high=1.0),
        row_setting("repetition_penalty", repetition_penalty, logits, torch.float32, above=0.0),
        row_setting("presence_penalty", presence_penalty, logits, torch.float32),
        row_setting("frequency_penalty", frequency_penalty, logits, torch.float32),
        token_ids("prompt_ids", prompt_ids, logits),
        token_ids("output_ids", output_ids, logits),
        row_setting("seed", seed, logits, torch.int64),
        row_setting("position", position, logits, torch.int64),
        order == "vllm",
        return_logprobs,
        num_logprobs,
        bias_rows(logit_bias, logits.shape[0], logits.shape[1], logits.device),
        checked_mask(mask, logits.shape[0], logits.shape[1], logits.device),
        row_setting("typical_p", typical_p, logits, torch.float32, low=0.0),
    )
    return to_sample(outputs, return_logprobs, num_logprobs)


def to_sample(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], return_logprobs: bool, num_logprobs: int
) -> Sample:
    """Of the op's outputs, those that were asked for."""
    ids, valid, logprobs, processed_logprobs, top_ids, top_logprobs = outputs
    return Sample(
        ids,
        valid,
        logprobs if return_logprobs else None,
        processed_logprobs if return_logprobs else None,
        top_ids if num_logprobs else None,
        top_logprobs if num_logprobs else None,
    )


def _check_logits(logits: Tensor, num_logprobs: int, order: str) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (batch, vocab_size) with vocab_size > 0, not {tuple(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits must be fp32, bf16 or fp16, not {logits.dtype}")
    check_options(logits.shape[1], num_logprobs, order)


def check_options(vocab_size: int, num_logprobs: int, order: str) -> None:
    """Raises ValueError when one does not fit."""
    if not 0 <= num_logprobs <= vocab_size:
        raise ValueError(f"num_logprobs must be between 0 and vocab_size ({vocab_size}), not {num_logprobs}")
    if order not in ("hf", "vllm"):
        raise ValueError(f'order must be "hf" or "vllm", not {order!r}')


def row_setting(
    name: str,
    value: Setting | None,
    logits: Tensor,
    dtype: torch.dtype,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> Tensor | None:
    """`value` as a `(batch,)` tensor, batch and device being those of `logits`.

    Numbers are checked; tensors are not read, which would wait for the GPU.
    """
    if value is None:
        return None
    batch = logits.shape[0]
    if isinstance(value, Tensor):
        if value.shape != (batch,) or value.dtype != dtype:
            raise ValueError(f"{name} must be ({batch},) {dtype}, not {tuple(value.shape)} {value.dtype}")
        if value.device != logits.device:
            raise ValueError(f"{name} must be on {logits.device} like the logits, not on {value.device}")
        return value
    if not (low <= value <= high and value > above and math.isfinite(value)):
        allowed = f"above {above}" if above > -math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be a finite number {allowed}, not {value}")
    return torch.full((batch,), value, dtype=dtype, device=logits.device)


def bias_rows(bias: Tensor | None, batch: int, vocab_size: int, device: torch.device) -> Tensor | None:
    """The bias as (batch, vocab_size), its last dimension contiguous."""
    if bias is None:
        return None
    if bias.shape not in ((vocab_size,), (batch, vocab_size)) or bias.dtype != torch.float32 or bias.device != device:
        raise ValueError(
            f"logit_bias must be fp32 ({vocab_size},) or ({batch}, {vocab_size}) on {device}, "
            f"not {bias.dtype} {tuple(bias.shape)} on {bias.device}"
        )
    bias = bias.detach()
    return (bias if bias.stride(-1) == 1 else bias.contiguous()).expand(batch, vocab_size)


def checked_mask(mask: Tensor | None, batch: int, vocab_size: int, device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    words = (vocab_size + 31) // 32
    if mask.shape != (batch, words) or mask.dtype != torch.int32 or mask.device != device:
        raise ValueError(
            f"mask must be ({batch}, {words}) int32, a bit a token, on {device}, "
            f"not {tuple(mask.shape)} {mask.dtype} on {mask.device}"
        )
    return mask if mask.stride(-1) == 1 else mask.contiguous()


def token_ids(name: str, ids: Tensor | None, logits: Tensor) -> Tensor | None:
    if ids is None:
        return None
    batch = logits.shape[0]
    if ids.ndim != 2 or ids.shape[0] != batch or ids.dtype != torch.int64 or ids.device != logits.device:
        raise ValueError(
            f"{name} must be ({batch}, n) int64 on {logits.device}, not {tuple(ids.shape)} {ids.dtype} on {ids.device}"
        )
    return ids


OP = Op("sampling", sample, ("triton", "cuda", "cpu", "reference"))

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _run(
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
) -> Outputs:
    """The tensors of `Sample`; those that were not asked for have no elements."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    backend = OP.select(
        logits,
        seed=seed,
        position=position,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        order="vllm" if min_p_first else "hf",
        return_logprobs=return_logprobs,
        num_logprobs=num_logprobs,
        logit_bias=logit_bias,
        mask=mask,
        typical_p=typical_p,
    )
    return backend.sample(
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        prompt_ids,
        output_ids,
        seed,
        position,
        min_p_first,
        return_logprobs,
        num_logprobs,
        logit_bias,
        mask,
        *(() if typical_p is None else (typical_p,)),
    )


def _fake(
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
) -> Outputs:
    return empty_outputs(logits, return_logprobs, num_logprobs)


def empty_outputs(rows: Tensor, return_logprobs: bool, num_logprobs: int) -> Outputs:
    """Outputs for as many rows, unwritten, on their device: what the op's fake implementation gives."""
    batch = rows.shape[0]
    logprobs = rows.new_empty(batch if return_logprobs else 0, dtype=torch.float32)
    top = (batch, num_logprobs) if num_logprobs else (0,)
    return (
        rows.new_empty(batch, dtype=torch.int64),
        rows.new_empty(batch, dtype=torch.bool),
        logprobs,
        torch.empty_like(logprobs),
        rows.new_empty(top, dtype=torch.int64),
        rows.new_empty(top, dtype=torch.float32),
    )


_sample = define_op(
    "sampling(Tensor logits, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
    "Tensor? repetition_penalty, Tensor? presence_penalty, Tensor? frequency_penalty, Tensor? prompt_ids, "
    "Tensor? output_ids, Tensor seed, Tensor position, bool min_p_first, bool return_logprobs, int num_logprobs, "
    "Tensor? logit_bias=None, Tensor? mask=None, Tensor? typical_p=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
