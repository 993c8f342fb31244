"""What a caller may ask of generation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastlm.errors import ConfigError

MAX_SAMPLES = 1024  # of one request: a typing error must not fill the queue


@dataclass(frozen=True)
class SamplingParams:
    """How a continuation is drawn.

    Args:
        max_tokens: most tokens to generate.
        temperature: 0 takes the most probable token; above 1 flattens the distribution.
        top_k, top_p, min_p, typical_p: filters on the distribution; None leaves it whole.
        order: in which the filters apply, as in transformers ("hf") or vLLM, see `fastlm.ops.sample`.
        repetition_penalty: above 1, makes tokens of the prompt and the continuation less probable (Keskar et al. 2019).
        presence_penalty: subtracted from the logit of every token that the continuation has used.
        frequency_penalty: the same, times the number of its uses. Both as in OpenAI's API.
        logit_bias: token id -> what is added to its logit. -inf forbids it.
        seed: same seed, same text, whatever else is generated beside it. The i-th of n samples has seed + i.
        n: continuations of the prompt.
        stop: strings at which generation ends; they are not part of the text.
        stop_token_ids: tokens at which generation ends; they are not part of the text.
        ignore_eos: go on after an end-of-text token instead of ending there.
        min_tokens: tokens before which neither an end-of-text token nor one of `stop_token_ids` is drawn.
        logprobs: log-probabilities of the drawn tokens in the model's own distribution (before penalties, bias,
            temperature and filters), and of this many most probable ones at each place. None asks for none.
        prompt_logprobs: the same for the tokens of the prompt.
        prompt_logprobs_start: the first token of the prompt that this is asked of. Those before it cost no logits, and
            may come from the cache.
        json_schema: the text is JSON of this schema (a JSON string, or what it stands for).
        regex: the text matches this regular expression as a whole.
        grammar: the text follows this grammar, in Lark's notation. At most one of these three; see
            `fastlm.inference.grammar`.

    Raises ConfigError when a value is out of range.
    """

    max_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    order: Literal["hf", "vllm"] = "hf"
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        _require_count("max_tokens", self.max_tokens)
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 or more, not {self.temperature!r}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ConfigError(f"top_k must be a positive integer, not {self.top_k!r}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(f"min_p must be between 0 and 1, not {self.min_p!r}")
        if self.typical_p is not None and not 0.0 < self.typical_p <= 1.0:
            raise ConfigError(f"typical_p must be above 0 and at most 1, not {self.typical_p!r}")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be a positive number, not {self.repetition_penalty!r}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be a finite number, not {getattr(self, name)!r}")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or token < 0 or not bias < math.inf:  # NaN fails this as well
                raise ConfigError(f"logit_bias must map token ids to numbers below infinity, not {token!r} to {bias!r}")
        if type(self.n) is not int or not 1 <= self.n <= MAX_SAMPLES:
            raise ConfigError(f"n must be an integer from 1 to {MAX_SAMPLES}, not {self.n!r}")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed must lie between 0 and 2^63 - 1, not {self.seed!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ConfigError("stop must be a tuple of non-empty strings")
        stop_ids = self.stop_token_ids
        if not isinstance(stop_ids, tuple) or not all(type(i) is int and i >= 0 for i in stop_ids):
            raise ConfigError(f"stop_token_ids must be a tuple of token ids, not {stop_ids!r}")
        _require_count("min_tokens", self.min_tokens)
        _require_count("prompt_logprobs_start", self.prompt_logprobs_start)
        if self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name))
        if self.order not in ("hf", "vllm"):
            raise ConfigError(f'order must be "hf" or "vllm", not {self.order!r}')
        if sum(g is not None for g in (self.json_schema, self.regex, self.grammar)) > 1:
            raise ConfigError("json_schema, regex and grammar exclude each other")


def _require_count(name: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise ConfigError(f"{name} must be 0 or a positive integer, not {value!r}")
