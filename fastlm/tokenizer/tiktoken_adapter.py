"""A tokenizer behind the methods of `tiktoken.Encoding`, for code that is written for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastlm.errors import TokenizerError
from fastlm.tokenizer.special_policy import AllowedSpecial, DisallowedSpecial

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastlm.tokenizer.tokenizer import Tokenizer


class TiktokenEncoding:
    """What `as_tiktoken` gives. Methods are those of `tiktoken.Encoding`, save `encode_with_unstable`.

    Errors have tiktoken's types: ValueError for a special token in text that is not allowed, KeyError for a token or id
    that is not in the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = tokenizer.name
        self._tokenizer = tokenizer
        self._special_tokens = dict(tokenizer.special_tokens)

    def __repr__(self) -> str:
        return f"<Encoding {self.name!r}>"

    def encode(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> list[int]:
        """Ids of `text`. Raises ValueError when it holds a disallowed special token."""
        return self._tokenizer.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, special tokens being ordinary text."""
        return self._tokenizer.encode_ordinary(text)

    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> npt.NDArray[np.uint32]:
        """`encode` as an array, `(tokens,)`, uint32."""
        return self._tokenizer.encode_to_numpy(
            text, allowed_special=allowed_special, disallowed_special=disallowed_special
        )

    def encode_batch(
        self,
        text: Sequence[str],
        *,
        num_threads: int = 8,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> list[list[int]]:
        """`encode` of each."""
        return self._tokenizer.encode_batch(
            text, num_threads=num_threads, allowed_special=allowed_special, disallowed_special=disallowed_special
        )

    def encode_ordinary_batch(self, text: Sequence[str], *, num_threads: int = 8) -> list[list[int]]:
        """`encode_ordinary` of each."""
        return self._tokenizer.encode_batch(text, num_threads=num_threads, disallowed_special=())

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """The id of one whole token, special ones included. Raises KeyError when there is none."""
        token = text_or_bytes.encode() if isinstance(text_or_bytes, str) else text_or_bytes
        special = self._special_tokens.get(token.decode("utf-8", "replace"))
        return self._by_bytes()[token] if special is None else special

    def decode(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """Text of ids. Raises KeyError for an id that is not in the vocabulary."""
        return self.decode_bytes(tokens).decode("utf-8", errors)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Bytes of ids. Raises KeyError for an id that is not in the vocabulary."""
        try:
            return self._tokenizer.decode_bytes(tokens)
        except TokenizerError as error:
            raise KeyError(str(error)) from None

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Bytes of one id. Raises KeyError when it is not in the vocabulary."""
        return self._bytes_of(token)

    def decode_tokens_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        """Bytes of each id."""
        return [self._bytes_of(token) for token in tokens]

    def decode_with_offsets(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """Text, and for each id the index of the character that its first byte belongs to. Raises on invalid UTF-8."""
        offsets = []
        characters = 0
        parts = self.decode_tokens_bytes(tokens)
        for part in parts:
            offsets.append(max(0, characters - (0x80 <= part[0] < 0xC0)))
            characters += sum(1 for byte in part if not 0x80 <= byte < 0xC0)
        return b"".join(parts).decode("utf-8", "strict"), offsets

    def decode_batch(
        self, batch: Sequence[Sequence[int]], *, errors: str = "replace", num_threads: int = 8
    ) -> list[str]:
        """`decode` of each."""
        return [self.decode(tokens, errors) for tokens in batch]

    def decode_bytes_batch(self, batch: Sequence[Sequence[int]], *, num_threads: int = 8) -> list[bytes]:
        """`decode_bytes` of each."""
        return [self.decode_bytes(tokens) for tokens in batch]

    def token_byte_values(self) -> list[bytes]:
        """The bytes of every ordinary token, sorted."""
        return sorted(self._by_bytes())

    @property
    def eot_token(self) -> int:
        """The id that ends a text. Raises KeyError when the vocabulary has none."""
        if self._tokenizer.eos_token_id is None:
            raise KeyError("<|endoftext|>")
        return self._tokenizer.eos_token_id

    @property
    def special_tokens_set(self) -> set[str]:
        """The special tokens' strings."""
        return set(self._special_tokens)

    def is_special_token(self, token: int) -> bool:
        """Whether an id is a special token's."""
        return token in self._special_tokens.values()

    @property
    def n_vocab(self) -> int:
        """Highest id + 1."""
        return self._tokenizer.vocab_size

    @property
    def max_token_value(self) -> int:
        """Highest id."""
        return self._tokenizer.vocab_size - 1

    def _bytes_of(self, token: int) -> bytes:
        try:
            return self._tokenizer.token_bytes(token)
        except TokenizerError as error:
            raise KeyError(str(error)) from None

    def _by_bytes(self) -> dict[bytes, int]:
        if self._tokenizer.mergeable_ranks:
            return self._tokenizer.mergeable_ranks
        from fastlm.tokenizer.sentencepiece import SentencePieceTokenizer

        assert isinstance(self._tokenizer, SentencePieceTokenizer)
        special = set(self._special_tokens.values())
        return {self._bytes_of(i): i for i in self._tokenizer.pieces.values() if i not in special}


def as_tiktoken(tokenizer: Tokenizer) -> TiktokenEncoding:
    """`tokenizer` behind the methods of `tiktoken.Encoding`."""
    return TiktokenEncoding(tokenizer)
