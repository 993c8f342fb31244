"""One continuation in the making: its tokens, its settings, and how far the cache holds it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

from torch import Tensor

from fastlm.errors import TokenizerError
from fastlm.inference.block_manager import BlockTable
from fastlm.inference.drafts import PromptLookup
from fastlm.inference.grammar import Matcher
from fastlm.inference.outputs import FinishReason, PromptLogprobs
from fastlm.inference.sampling_params import SamplingParams
from fastlm.inference.text import TextStream
from fastlm.tokenizer import Tokenizer

Pooling = Literal["mean", "last", "logits"]


class Sequence:
    """Continuation `index` of a request.

    The model sees the tokens of a window, which is the whole sequence unless `reread` has moved its beginning.
    """

    def __init__(
        self,
        request_id: Hashable,
        index: int,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        seed: int,
        pooling: Pooling | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.seed = seed
        self.tokens = list(prompt_ids)
        self.prompt_length = len(prompt_ids)
        self.window_start = 0
        self.table = BlockTable()
        self.num_computed = 0  # tokens of the window whose keys and values are in the cache
        self.text = TextStream(params.stop)
        self.lookup = PromptLookup()
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        if wants_prompt_logprobs(params, index):
            self.prompt_logprobs = [None] * max(1, params.prompt_logprobs_start)
        self.matcher = matcher
        self.pooling = pooling
        self.pooled: Tensor | None = None  # fp32: sum or last of the hidden states (hidden_size,), or logits

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def window_length(self) -> int:
        return len(self.tokens) - self.window_start

    def window(self) -> list[int]:
        return self.tokens[self.window_start :] if self.window_start else self.tokens

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at all."""
        return self.params.max_tokens > 0 and self.pooling is None

    @property
    def is_read(self) -> bool:
        """Whether something is wanted of the prompt's tokens themselves."""
        return self.prompt_logprobs is not None or self.pooling in ("mean", "last")

    def shareable(self) -> list[int]:
        """The tokens of the window of which all but the last may come from the cache."""
        if self.pooling in ("mean", "last"):
            return []
        window = self.window()
        return window if self.prompt_logprobs is None else window[: len(self.prompt_logprobs)]

    def reread(self, num_tokens: int) -> None:
        """Moves the window to the latest `num_tokens`. Its blocks must have been released."""
        self.window_start = len(self.tokens) - num_tokens
        self.num_computed = 0

    def accept(self, token: int, tokenizer: Tokenizer) -> str:
        """Takes the next token; the text that it adds. Sets `finish_reason` when the sequence ends with it."""
        self.tokens.append(token)
        if token in self.params.stop_token_ids:
            self.finish_reason = "stop"
            return self.text.finish()
        if token == tokenizer.eos_token_id and (self.matcher is not None or not self.params.ignore_eos):
            self.finish_reason = "eos"
            return self.text.finish()
        if self.matcher is not None:
            self.matcher.accept(token)
        text = self.text.push(_bytes(token, tokenizer))
        if self.text.stopped:
            self.finish_reason = "stop"
        elif self.matcher is not None and self.matcher.ended:
            self.finish_reason = "stop"
            text += self.text.finish()
        elif self.generated >= self.params.max_tokens:
            self.finish_reason = "length"
            text += self.text.finish()
        return text


def _bytes(token: int, tokenizer: Tokenizer) -> bytes:
    if token == tokenizer.eos_token_id:
        return b"\n"  # what an end of text looks like inside one
    try:
        return tokenizer.token_bytes(token)
    except TokenizerError:  # a hole in the vocabulary, which a model may draw and which spells nothing
        return b""


def wants_prompt_logprobs(params: SamplingParams, index: int) -> bool:
    return params.prompt_logprobs is not None and index == 0
