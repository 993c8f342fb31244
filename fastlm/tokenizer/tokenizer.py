"""Byte-level BPE: text to ids and back, exactly as tiktoken and Hugging Face's `tokenizers` do it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence, Set
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import regex

from fastlm._core import native
from fastlm.errors import TokenizerError
from fastlm.tokenizer.patterns import PATTERN_NAMES, name_of_pattern
from fastlm.tokenizer.streaming import DecodeStream

if TYPE_CHECKING:
    import numpy.typing as npt

AllowedSpecial = Literal["all"] | Set[str]
DisallowedSpecial = Literal["all"] | Collection[str]

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")
_BATCH_BYTES_PER_THREAD = 1 << 16  # about a millisecond of work, against tens of microseconds to start a thread


class Tokenizer:
    """A byte-level BPE vocabulary with the pattern that splits text before merging.

    Args:
        mergeable_ranks: id of each token's bytes; all 256 single bytes must be there.
        pattern: "gpt2", "cl100k", "o200k", "llama3" or "qwen2", or any regular expression for the `regex` package. One
            that is known by name runs as a native scanner, any other is slower. Text between its matches is kept, each
            gap a pre-token of its own, as `tokenizers` does (tiktoken drops it).
        special_tokens: strings that text never makes unless `allowed_special` says so, and their ids.
        merges: None for tiktoken's rules: two neighbours merge when their concatenation is a token, lowest id first,
            and a pre-token that is a token is never merged piecemeal. A list for Hugging Face's: these pairs merge,
            first in the list first.
        name: for messages and `repr`.

    Raises:
        TokenizerError: bytes without a token, one id for two tokens, an unknown token in `merges`, or a pattern that
            does not compile.

    Python strings with lone surrogates are not Unicode text. As in tiktoken, surrogates that pair up become their
    character and lone ones U+FFFD. Every method may be called from several threads at a time.
    """

    def __init__(
        self,
        mergeable_ranks: dict[bytes, int],
        *,
        pattern: str,
        special_tokens: dict[str, int] | None = None,
        merges: list[tuple[bytes, bytes]] | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.pattern = name_of_pattern(pattern)
        """The pattern's name, or the regular expression if it has none."""
        self.mergeable_ranks = dict(mergeable_ranks)
        self.special_tokens = dict(special_tokens or {})
        self.merges = None if merges is None else [(left, right) for left, right in merges]
        self.vocab_size = 1 + max([*self.mergeable_ranks.values(), *self.special_tokens.values()], default=-1)
        """Highest id + 1: how many rows an embedding needs."""
        self.eos_token_id = next((self.special_tokens[t] for t in _END_OF_TEXT if t in self.special_tokens), None)
        self._regex = None if self.pattern in PATTERN_NAMES else _compile(self.pattern)
        self._native = self._build()
        self._no_specials = native().SpecialTokens([])
        self._all_specials = native().SpecialTokens(list(self.special_tokens.items()))
        self._matcher = lru_cache(maxsize=64)(partial(_make_matcher, self.special_tokens))

    def __repr__(self) -> str:
        return f"<Tokenizer {self.name!r}: {self.vocab_size} ids, pattern {self.pattern!r:.40}>"

    @classmethod
    def from_tiktoken(
        cls,
        name_or_path: str | Path,
        *,
        pattern: str | None = None,
        special_tokens: dict[str, int] | None = None,
        download: bool = False,
    ) -> Tokenizer:
        """A published encoding by name, from tiktoken's cache directory, or a `.tiktoken` file.

        See `fastlm.tokenizer.tiktoken_format.load_tiktoken`.
        """
        from fastlm.tokenizer.tiktoken_format import load_tiktoken

        return load_tiktoken(name_or_path, pattern=pattern, special_tokens=special_tokens, download=download)

    @classmethod
    def from_huggingface(cls, path: str | Path) -> Tokenizer:
        """Reads a `tokenizer.json`, or that of a model's directory. See `huggingface_format.load_tokenizer_json`."""
        from fastlm.tokenizer.huggingface_format import load_tokenizer_json

        path = Path(path)
        return load_tokenizer_json(path / "tokenizer.json" if path.is_dir() else path)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads what `save` wrote."""
        return cls.from_huggingface(path)

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json` that Hugging Face's `tokenizers` loads with equal ids."""
        from fastlm.tokenizer.huggingface_format import save_tokenizer_json

        save_tokenizer_json(self, path)

    def encode(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> list[int]:
        """Ids of `text`.

        Special tokens steer a model, so text from outside must not make them by accident. By default a text that holds
        one is refused.

        Args:
            allowed_special: special tokens that are encoded as such; "all" of them, or a set.
            disallowed_special: strings that the text must not hold; "all" means the special tokens that are not
                allowed. With `()`, text that spells a special token is encoded as ordinary text.

        Raises:
            TokenizerError: the text holds a disallowed special token.
        """
        return self._encode(text, *self._policy(allowed_special, disallowed_special))

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text` with no regard to special tokens: `encode(text, disallowed_special=())`."""
        return self._encode(text, self._no_specials, self._no_specials)

    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> npt.NDArray[np.uint32]:
        """`encode` without the cost of a Python list: `(tokens,)`, uint32."""
        allowed, disallowed = self._policy(allowed_special, disallowed_special)
        if self._regex is not None:
            return np.array(self._encode_by_regex(text, allowed, disallowed), dtype=np.uint32)
        try:
            return self._native.encode_to_numpy(text, allowed, disallowed)
        except UnicodeEncodeError:
            return self._native.encode_to_numpy(_without_surrogates(text), allowed, disallowed)

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        num_threads: int | None = None,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> list[list[int]]:
        """`encode` of each text, in C++ threads.

        Args:
            num_threads: None takes as many as there are processors and work for.

        Raises:
            TokenizerError: as `encode`; the first text that is refused counts.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of str, not one str")
        if num_threads is None:
            size = sum(map(len, texts))
            num_threads = min(_num_processors(), max(1, size // _BATCH_BYTES_PER_THREAD))
        if num_threads < 1:
            raise TokenizerError(f"num_threads is {num_threads}; give 1 or more")
        allowed, disallowed = self._policy(allowed_special, disallowed_special)
        if self._regex is not None:
            return [self._encode_by_regex(text, allowed, disallowed) for text in texts]
        try:
            return self._native.encode_batch(list(texts), allowed, disallowed, num_threads)
        except UnicodeEncodeError:
            return self._native.encode_batch(
                [_without_surrogates(text) for text in texts], allowed, disallowed, num_threads
            )

    def encode_with_offsets(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> tuple[list[int], list[int]]:
        """Ids, and for each the index in `text` of the character that its first byte belongs to.

        Tokens that begin inside one character have the same offset. Equal to tiktoken's `decode_with_offsets`.
        """
        ids = self.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
        return ids, self._native.offsets(ids)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that may not be UTF-8, with no regard to special tokens. Decoding gives `data` back.

        Up to the first byte that is not UTF-8 this is `encode_ordinary`; from the start of the pre-token before it (and
        of the white space that this ends, if it does) the rest is merged as one piece, as tiktoken does: a text cut
        inside a character keeps the ids that it would have had. O(n log n) in the length of that rest.
        """
        try:
            return self.encode_ordinary(data.decode())
        except UnicodeDecodeError as error:
            valid = error.start
        pieces = self._pretokenize(data[:valid].decode())
        ids = [i for piece in pieces for i in self._native.encode_piece(piece)]
        unstable = len(self._native.encode_piece(pieces[-1])) if pieces else 0
        if unstable and self._is_blank(ids[-unstable]):
            while unstable < len(ids) and self._is_blank(ids[-unstable - 1]):
                unstable += 1
        stable = ids[: len(ids) - unstable]
        return stable + self._native.encode_piece(self.decode_bytes(ids[len(stable) :]) + data[valid:])

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Text of `ids`. `errors` says what to do with bytes that are not UTF-8, as in `bytes.decode`.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        return self._native.decode(ids).decode("utf-8", errors)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`: exactly what was encoded.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        return self._native.decode(ids)

    def decode_batch(self, batch: Iterable[Iterable[int]], errors: str = "replace") -> list[str]:
        """`decode` of each."""
        return [self.decode(ids, errors) for ids in batch]

    def decode_stream(self) -> DecodeStream:
        """Decodes ids as they come, never giving half a character."""
        return DecodeStream(self.token_bytes)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one id stands for.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        return self._native.decode((id,))

    def fingerprint(self) -> str:
        """SHA-256 (hex) over vocabulary, merges, pattern and special tokens: equal when ids are equal on every text."""
        digest = hashlib.sha256()

        def add(*values: bytes | int | str) -> None:
            for value in values:
                data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "little") + data)

        add("fastlm tokenizer 1", self.pattern)
        add("ranks", len(self.mergeable_ranks))
        for token, rank in sorted(self.mergeable_ranks.items(), key=lambda item: item[1]):
            add(token, rank)
        add("merges", -1 if self.merges is None else len(self.merges))
        for left, right in self.merges or ():
            add(left, right)
        add("special tokens", len(self.special_tokens))
        for special, rank in sorted(self.special_tokens.items()):
            add(special, rank)
        return digest.hexdigest()

    def _build(self) -> Any:
        merges = None
        if self.merges is not None:
            try:
                merges = [(self.mergeable_ranks[left], self.mergeable_ranks[right]) for left, right in self.merges]
            except KeyError as error:
                raise TokenizerError(f"merges use {error}, which is no token") from None
        pattern = "" if self._regex is not None else self.pattern
        try:
            return native().BpeEncoder(self.mergeable_ranks, merges, pattern, self.special_tokens)
        except TokenizerError:
            raise
        except ValueError as error:
            raise TokenizerError(f"this vocabulary cannot be used: {error}") from None

    def _policy(self, allowed: AllowedSpecial, disallowed: DisallowedSpecial) -> tuple[Any, Any]:
        """Native matchers of what is allowed and what is disallowed."""
        if disallowed == "all":
            if not allowed:
                return self._no_specials, self._all_specials
            if allowed == "all":
                return self._all_specials, self._no_specials
            disallowed = self.special_tokens.keys() - allowed
        elif isinstance(disallowed, str):
            raise TypeError(f'disallowed_special must be "all" or a collection of str, not {disallowed!r}')
        if allowed == "all":
            allowed_matcher = self._all_specials
        elif isinstance(allowed, str):
            raise TypeError(f'allowed_special must be "all" or a set of str, not {allowed!r}')
        else:
            allowed_matcher = self._matcher(frozenset(self.special_tokens.keys() & allowed))
        return allowed_matcher, self._matcher(frozenset(disallowed))

    def _pretokenize(self, text: str) -> list[bytes]:
        if self._regex is None:
            return native().pretokenize(self.pattern, text.encode())
        pieces = []
        end = 0
        for match in self._regex.finditer(text):
            pieces += [text[end : match.start()], match.group()]
            end = match.end()
        pieces.append(text[end:])
        return [piece.encode() for piece in pieces if piece]

    def _encode(self, text: str, allowed: Any, disallowed: Any) -> list[int]:
        if self._regex is not None:
            return self._encode_by_regex(text, allowed, disallowed)
        try:
            return self._native.encode(text, allowed, disallowed)
        except UnicodeEncodeError:
            return self._native.encode(_without_surrogates(text), allowed, disallowed)

    def _encode_by_regex(self, text: str, allowed: Any, disallowed: Any) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            text = _without_surrogates(text)
        disallowed.refuse(text)
        ids: list[int] = []
        for part in allowed.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                for piece in self._pretokenize(part):
                    ids += self._native.encode_piece(piece)
        return ids

    def _is_blank(self, id: int) -> bool:
        return not self.token_bytes(id).strip(b" \n\t")


def _make_matcher(ids: dict[str, int], tokens: frozenset[str]) -> Any:
    """A disallowed string need not be a token, so it may have no id."""
    return native().SpecialTokens([(token, ids.get(token, 0)) for token in tokens])


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _compile(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise TokenizerError(
            f"the pattern {pattern!r:.80} is neither a name ({', '.join(PATTERN_NAMES)}) nor a regular expression: "
            f"{error}"
        ) from None


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
