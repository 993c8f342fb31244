"""What generation gives back."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

FinishReason = Literal["length", "stop", "eos", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token in the model's own distribution, and those of the most probable tokens there."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), most probable first


PromptLogprobs = list[TokenLogprob | None]  # for each token of the prompt; none for the first, which nothing predicts


@dataclass(frozen=True)
class Piece:
    """What one token, or the end, adds to continuation `index` of a request.

    The last piece of a continuation has a `finish_reason`; with "error", `error` says what went wrong. The first piece
    of a request holds `prompt_logprobs`, and its only one the `embedding`, if these were asked for.
    """

    request_id: Hashable
    text: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    index: int = 0
    logprob: TokenLogprob | None = None
    prompt_logprobs: PromptLogprobs | None = None
    embedding: Tensor | None = None
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """What followed a prompt. `token_ids` may hold bytes that `text` leaves out, see `TextStream`.

    `prompt` is as it was given: text, or token ids. `index` numbers the n continuations of one prompt.
    """

    prompt: str | list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    index: int = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    error: str | None = None


def completion(prompt: str | list[int], pieces: list[Piece]) -> Completion:
    """The pieces of one continuation, put together."""
    last = pieces[-1]
    assert last.finish_reason is not None
    logprobs = [p.logprob for p in pieces if p.logprob is not None]
    return Completion(
        prompt=prompt,
        text="".join(p.text for p in pieces),
        token_ids=[p.token_id for p in pieces if p.token_id is not None],
        finish_reason=last.finish_reason,
        index=last.index,
        logprobs=logprobs or None,
        prompt_logprobs=pieces[0].prompt_logprobs,
        error=last.error,
    )
