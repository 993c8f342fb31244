"""From logits to tokens: every row with the settings of its own sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.inference.outputs import TokenLogprob
from fastlm.inference.sampling_params import SamplingParams
from fastlm.inference.sequence import Sequence
from fastlm.ops import sample


@dataclass(frozen=True)
class Row:
    """A row of logits: what follows the tokens of `sequence` and then `drafts`."""

    sequence: Sequence
    drafts: list[int]

    @property
    def generated(self) -> int:
        return self.sequence.generated + len(self.drafts)


@dataclass(frozen=True)
class Draw:
    """A drawn token; None where nothing could be drawn, since the logits were not finite or every token forbidden."""

    token: int | None
    logprob: TokenLogprob | None = None


def draw(logits: Tensor, rows: list[Row], eos_token_id: int | None) -> list[Draw]:
    """One draw a row of logits `(rows, vocab_size)`, by (seed, number of tokens generated before it)."""
    tokens: list[int | None] = [None] * len(rows)
    edited = _edit(logits, rows, eos_token_id)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.sequence.params.order, []).append(i)
    for order, chosen in groups.items():
        part = edited if len(chosen) == len(rows) else edited[chosen]
        for i, token in zip(chosen, _draw_tokens(part, [rows[i] for i in chosen], order), strict=True):
            tokens[i] = token
    logprobs: dict[int, TokenLogprob] = {}
    wanted = [i for i, row in enumerate(rows) if row.sequence.params.logprobs is not None and tokens[i] is not None]
    if wanted:
        count = max(rows[i].sequence.params.logprobs or 0 for i in wanted)
        found = token_logprobs(logits[wanted], [tokens[i] or 0 for i in wanted], count)
        for i, entry in zip(wanted, found, strict=True):
            top = entry.top[: rows[i].sequence.params.logprobs]
            logprobs[i] = TokenLogprob(entry.token_id, entry.logprob, top)
    return [Draw(token, logprobs.get(i)) for i, token in enumerate(tokens)]


def token_logprobs(logits: Tensor, tokens: list[int], num_top: int) -> list[TokenLogprob]:
    """Log-probability of one token a row in softmax(logits), and the `num_top` most probable ones."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    if num_top == 0:
        return [TokenLogprob(token, value) for token, value in zip(tokens, chosen, strict=True)]
    values, ids = logprobs.topk(num_top)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(token, value, top) for token, value, top in zip(tokens, chosen, tops, strict=True)]


def _edit(logits: Tensor, rows: list[Row], eos_token_id: int | None) -> Tensor:
    """The logits with biases added and forbidden tokens at -inf; the same tensor where no row asks for either."""
    edited = logits
    for i, row in enumerate(rows):
        params, matcher = row.sequence.params, row.sequence.matcher
        bias = dict(params.logit_bias)
        if row.generated < params.min_tokens:
            ends = (*params.stop_token_ids, *(() if eos_token_id is None else (eos_token_id,)))
            bias.update({token: -torch.inf for token in ends if token < logits.shape[1]})
        if (bias or matcher is not None) and edited is logits:
            edited = logits.float().clone()
        if matcher is not None:
            edited[i].masked_fill_(~matcher.allowed().to(logits.device), -torch.inf)
        if bias:
            edited[i, torch.tensor(list(bias), device=logits.device)] += torch.tensor(
                list(bias.values()), device=logits.device
            )
    return edited


def _draw_tokens(logits: Tensor, rows: list[Row], order: str) -> list[int | None]:
    params = [row.sequence.params for row in rows]
    device = logits.device

    def setting(
        value: Callable[[SamplingParams], float], neutral: float, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        """A value a row, or None when it changes nothing in any row."""
        values = [value(p) for p in params]
        if all(v == neutral for v in values):
            return None
        return torch.tensor(values, dtype=dtype, device=device)

    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device)
    repetition = setting(lambda p: p.repetition_penalty, 1.0)
    presence = setting(lambda p: p.presence_penalty, 0.0)
    frequency = setting(lambda p: p.frequency_penalty, 0.0)
    prompts = outputs = None
    if repetition is not None:
        prompts = _padded([row.sequence.tokens[: row.sequence.prompt_length] for row in rows], device)
    if repetition is not None or presence is not None or frequency is not None:
        outputs = _padded([row.sequence.tokens[row.sequence.prompt_length :] + row.drafts for row in rows], device)
    drawn = sample(
        logits,
        temperature=temperature,
        top_k=setting(lambda p: p.top_k or 0, 0, torch.int64),
        top_p=setting(lambda p: 1.0 if p.top_p is None else p.top_p, 1.0),
        min_p=setting(lambda p: p.min_p or 0.0, 0.0),
        typical_p=setting(lambda p: 1.0 if p.typical_p is None else p.typical_p, 1.0),
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        prompt_ids=prompts,
        output_ids=outputs,
        seed=torch.tensor([row.sequence.seed for row in rows], device=device),
        position=torch.tensor([row.generated for row in rows], device=device),
        order="hf" if order == "hf" else "vllm",
    )
    return [token if valid else None for token, valid in zip(drawn.ids.tolist(), drawn.valid.tolist(), strict=True)]


def _padded(ids: list[list[int]], device: torch.device) -> Tensor:
    longest = max(map(len, ids))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in ids], dtype=torch.int64, device=device)
