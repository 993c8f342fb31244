"""The vocabularies that a text can be cut by, beside the model's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from fastlm.data.stand_in import stand_in_tokenizer
from fastlm.errors import FastlmError
from fastlm.serve.errors import ApiError
from fastlm.tokenizer import Tokenizer

TIKTOKEN = ("o200k_base", "cl100k_base", "gpt2")  # shown when they are in tiktoken's cache: none is downloaded
TRAINED = "fastlm (English, Korean)"
BYTES = "UTF-8 bytes"


class Cutter(Protocol):
    """What cuts a text into tokens with ids and bytes."""

    vocab_size: int

    def encode_ordinary(self, text: str) -> list[int]: ...

    def token_bytes(self, id: int) -> bytes: ...


class ByteVocabulary:
    """A token for each byte: what a model without a tokenizer would read."""

    vocab_size = 256

    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def token_bytes(self, id: int) -> bytes:
        return bytes([id])


class Vocabularies:
    """By name: the model's, those in `more` (tiktoken names or files), what tiktoken's cache has, and two of our own.

    Each is loaded when it is first asked for. For any thread.
    """

    def __init__(self, model_name: str, tokenizer: Tokenizer, more: Sequence[str] = ()) -> None:
        self.default = model_name
        self._loaders: dict[str, Callable[[], Cutter]] = {model_name: lambda: tokenizer}
        for name in more:
            self._loaders[name] = lambda name=name: _named(name)  # type: ignore[misc]
        for name in TIKTOKEN:
            if name not in self._loaders and _is_cached(name):
                self._loaders[name] = lambda name=name: Tokenizer.from_tiktoken(name)  # type: ignore[misc]
        self._loaders[TRAINED] = stand_in_tokenizer
        self._loaders[BYTES] = ByteVocabulary
        self._loaded: dict[str, Cutter] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self._loaders)

    def get(self, name: str | None) -> Cutter:
        """Raises ApiError when there is none of that name."""
        name = self.default if name is None else name
        if name not in self._loaders:
            known = ", ".join(map(repr, self.names))
            raise ApiError(404, f"there is no vocabulary {name[:100]!r}; there are {known}", param="vocabulary")
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._loaders[name]()
            return self._loaded[name]


def check_names(names: Sequence[str]) -> None:
    """Raises TokenizerError unless all can be loaded, so that this is known before a server begins."""
    for name in names:
        _named(name)


def _named(name: str) -> Tokenizer:
    from fastlm.tokenizer.tiktoken_format import ENCODINGS

    return Tokenizer.from_tiktoken(name) if name in ENCODINGS else Tokenizer.from_file(name)


def _is_cached(name: str) -> bool:
    try:
        Tokenizer.from_tiktoken(name)
    except FastlmError:
        return False
    return True
