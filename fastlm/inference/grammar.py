"""Text that follows a grammar: JSON of a schema, a regular expression, or a Lark grammar.

Before each draw, the tokens that the grammar does not allow are forbidden, so that the text follows it whatever the
model would say; a text that `max_tokens` cuts off is the beginning of one that does. The parser is llguidance's
(`pip install fastlm[grammar]`), which looks at bytes, so that it does not matter how a tokenizer cuts them.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
from torch import Tensor

from fastlm.errors import ConfigError, TokenizerError
from fastlm.inference.sampling_params import SamplingParams
from fastlm.tokenizer import Tokenizer

CACHED_GRAMMARS = 64  # compiling one takes milliseconds, of a large schema up to a second


class Matcher:
    """Where one text stands in its grammar."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def allowed(self) -> Tensor:
        """Which tokens may come next: `(vocab_size,)` bool, on the CPU."""
        return torch.frombuffer(bytearray(self._state.compute_logit_bias()), dtype=torch.uint8) != 0

    def accept(self, token: int) -> None:
        self._state.consume_token(token)

    @property
    def ended(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        return self._state.is_stopped()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed further, such as for its size."""
        return self._state.get_error().splitlines()[0] if self._state.is_error() else None


class GrammarCompiler:
    """Compiles grammars for one tokenizer. The last ones are kept. For any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._vocabulary: Any = None  # llguidance's view of the tokenizer, made when first needed
        self._compiled: dict[tuple[str, str], Any] = {}  # the least recently used first

    def matcher(self, params: SamplingParams) -> Matcher | None:
        """At the beginning of the grammar that `params` ask for; None when they ask for none.

        Raises:
            ConfigError: llguidance is not installed, or the grammar is not valid.
        """
        source = _source(params)
        if source is None:
            return None
        with self._lock:
            state = self._compiled.pop(source, None)
            if state is None:
                state = self._compile(*source)
            self._compiled[source] = state
            if len(self._compiled) > CACHED_GRAMMARS:
                del self._compiled[next(iter(self._compiled))]
            return Matcher(state.deep_copy())

    def _compile(self, kind: str, text: str) -> Any:
        try:
            import llguidance
        except ImportError:
            raise ConfigError(f"{kind} needs llguidance; install it with: pip install fastlm[grammar]") from None
        if self._vocabulary is None:
            wrapper = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size))
            self._vocabulary = llguidance.LLTokenizer(wrapper, n_vocab=self._vocab_size)
        make: dict[str, Any] = {
            "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
            "regex": llguidance.LLMatcher.grammar_from_regex,
            "grammar": llguidance.LLMatcher.grammar_from_lark,
        }
        try:
            state = llguidance.LLMatcher(self._vocabulary, make[kind](text), log_level=0)
        except ValueError as error:
            raise ConfigError(f"{kind} is not valid: {error}") from None
        if state.is_error():
            raise ConfigError(f"{kind} is not valid: {' '.join(state.get_error().split())[:500]}")
        return state


def _source(params: SamplingParams) -> tuple[str, str] | None:
    """(kind, text) of the grammar that is asked for."""
    if params.json_schema is not None:
        schema = params.json_schema
        return "json_schema", schema if isinstance(schema, str) else json.dumps(schema)
    if params.regex is not None:
        return "regex", params.regex
    if params.grammar is not None:
        return "grammar", params.grammar
    return None


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("a grammar needs a tokenizer with an end-of-text token")
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [self._bytes(i) for i in range(vocab_size)]
        self.special_token_ids = [i for i in tokenizer.special_tokens.values() if i < vocab_size]

    def _bytes(self, token: int) -> bytes:
        try:
            return self._tokenizer.token_bytes(token)
        except TokenizerError:  # a hole in the vocabulary
            return b""

    def __call__(self, data: bytes) -> list[int]:
        return self._tokenizer.encode_bytes(data)
