"""Text to ids and back, exactly as tiktoken and Hugging Face's `tokenizers` do it: byte-level BPE.

Vocabularies that merge characters instead (Llama 2, Gemma) are the subclass in sentencepiece.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlm._core import native
from fastlm.errors import TokenizerError
from fastlm.tokenizer.added_tokens import AddedToken, Section, Settings
from fastlm.tokenizer.patterns import PATTERN_NAMES, Pattern, RegexSplitter, name_of_pattern
from fastlm.tokenizer.special_policy import AllowedSpecial, DisallowedSpecial, SpecialPolicy
from fastlm.tokenizer.streaming import DecodeStream
from fastlm.tokenizer.unicode_text import utf8_runs, without_surrogates

if TYPE_CHECKING:
    import numpy.typing as npt

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")
_BATCH_BYTES_PER_THREAD = 1 << 16  # about a millisecond of work, against tens of microseconds to start a thread


class Tokenizer:
    """A byte-level BPE vocabulary with the pattern that splits text before merging.

    Args:
        mergeable_ranks: id of each token's bytes; all 256 single bytes must be there.
        pattern: a name from `patterns.PATTERN_NAMES` (native scanners) or `patterns.SEQUENCES`, or a regular expression
            for the `regex` package, or several that are applied in turn. Text between matches is kept, each gap a
            pre-token of its own, as `tokenizers` does (tiktoken drops it).
        special_tokens: strings that text never makes unless `allowed_special` says so, and their ids.
        merges: None for tiktoken's rules: two neighbours merge when their concatenation is a token, lowest id first,
            and a pre-token that is a token is never merged piecemeal. A list for Hugging Face's: these pairs merge,
            first in the list first.
        name: for messages and `repr`.
        settings: normalizer, added tokens that are more than strings, bos and eos, as files say it.

    Raises:
        TokenizerError: bytes without a token, one id for two tokens, an unknown token in `merges`, or a pattern that
            does not compile.

    Python strings with lone surrogates are not Unicode text. As in tiktoken, surrogates that pair up become their
    character and lone ones U+FFFD. Every method may be called from several threads at a time. A tokenizer never
    changes, so a copy is itself; pickling keeps what it was made of.
    """

    def __init__(
        self,
        mergeable_ranks: dict[bytes, int],
        *,
        pattern: Pattern,
        special_tokens: dict[str, int] | None = None,
        merges: list[tuple[bytes, bytes]] | None = None,
        name: str = "",
        settings: Settings | None = None,
    ) -> None:
        self.pattern = name_of_pattern(pattern)
        """The pattern's name, or the regular expressions if it has none."""
        self.mergeable_ranks = dict(mergeable_ranks)
        self.merges = None if merges is None else [(left, right) for left, right in merges]
        self._set_up(name, self.mergeable_ranks.values(), special_tokens or {}, settings or Settings())
        self._regex = None if self.pattern in PATTERN_NAMES else RegexSplitter(self.pattern)
        self._unencodable = _characters_of(b for b in range(0xF1, 0xF5) if bytes([b]) not in self.mergeable_ranks)
        self._is_direct = self._policy.is_plain and self._regex is None and self._unencodable is None
        self._native = self._build()

    def _set_up(self, name: str, ids: Iterable[int], special_tokens: dict[str, int], settings: Settings) -> None:
        self.name = name
        self.settings = settings
        added = [AddedToken(content, i) for content, i in special_tokens.items()]
        self.added_tokens = (*added, *settings.added_tokens)
        """Every token that is found in text before it is split."""
        self.special_tokens = {token.content: token.id for token in self.added_tokens if token.special}
        added_ids = [*(token.id for token in self.added_tokens), *(i for _, i in settings.unreachable)]
        self.vocab_size = 1 + max([*ids, *added_ids], default=-1)
        """Highest id + 1: how many rows an embedding needs."""
        ids_of = {token.content: token.id for token in self.added_tokens}
        eos = settings.eos_token or next((t for t in _END_OF_TEXT if t in self.special_tokens), None)
        self.eos_token_id = None if eos is None else ids_of.get(eos)
        self.bos_token_id = None if settings.bos_token is None else ids_of.get(settings.bos_token)
        self._policy = SpecialPolicy(self.added_tokens, settings)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {self.vocab_size} ids, pattern {self.pattern!r:.40}>"

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {"pattern": self.pattern, "special_tokens": self._plain_special_tokens(), "merges": self.merges}
        return _rebuild, (self.mergeable_ranks, arguments | {"name": self.name, "settings": self.settings})

    def __copy__(self) -> Tokenizer:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self

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
    def from_huggingface(cls, path_or_id: str | Path, *, revision: str | None = None) -> Tokenizer:
        """A `tokenizer.json`, a directory that holds one, or the id of a model on the Hugging Face hub.

        See `fastlm.tokenizer.huggingface_format.load_huggingface`.
        """
        from fastlm.tokenizer.huggingface_format import load_huggingface

        return load_huggingface(path_or_id, revision=revision)

    @classmethod
    def from_gguf(cls, path: str | Path, *, pattern: Pattern | None = None) -> Tokenizer:
        """The vocabulary of a GGUF file. See `fastlm.tokenizer.gguf_format.load_gguf`."""
        from fastlm.tokenizer.gguf_format import load_gguf

        return load_gguf(path, pattern=pattern)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Any vocabulary file: `tokenizer.json` (what `save` writes), GGUF, Mistral's `tekken.json`, or SentencePiece's
        `tokenizer.model`, told apart by their content; or a directory that holds one of them."""
        from fastlm.tokenizer.file_formats import load_file

        return load_file(path)

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
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Ids of `text`.

        Special tokens steer a model, so text from outside must not make them by accident. By default a text that holds
        one is refused.

        Args:
            allowed_special: special tokens that are encoded as such; "all" of them, or a set.
            disallowed_special: strings that the text must not hold; "all" means the special tokens that are not
                allowed. With `()`, text that spells a special token is encoded as ordinary text.
            add_special_tokens: put what the vocabulary's file puts around a text, such as `<bos>`, around the ids.

        Raises:
            TokenizerError: the text holds a disallowed special token.
        """
        ids = self._encode(text, *self._policy.resolve(allowed_special, disallowed_special))
        return self._surround(ids) if add_special_tokens else ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text` with no regard to special tokens: `encode(text, disallowed_special=())`."""
        return self._encode(text, self._policy.find_none, self._policy.refuse_none)

    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
        add_special_tokens: bool = False,
    ) -> npt.NDArray[np.uint32]:
        """`encode` without the cost of a Python list: `(tokens,)`, uint32."""
        allowed, disallowed = self._policy.resolve(allowed_special, disallowed_special)
        if not self._is_direct:
            ids = self._encode_parts_to_numpy(self._parts(text, allowed, disallowed))
        else:
            try:
                ids = self._native.encode_to_numpy(text, allowed, disallowed)
            except UnicodeEncodeError:
                ids = self._native.encode_to_numpy(without_surrogates(text), allowed, disallowed)
        return np.array(self._surround(ids.tolist()), dtype=np.uint32) if add_special_tokens else ids

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        num_threads: int | None = None,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
        add_special_tokens: bool = False,
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
        allowed, disallowed = self._policy.resolve(allowed_special, disallowed_special)
        if not self._is_direct:
            batch = self._encode_parts_batch([self._parts(text, allowed, disallowed) for text in texts], num_threads)
        else:
            try:
                batch = self._native.encode_batch(list(texts), allowed, disallowed, num_threads)
            except UnicodeEncodeError:
                cleaned = [without_surrogates(text) for text in texts]
                batch = self._native.encode_batch(cleaned, allowed, disallowed, num_threads)
        return [self._surround(ids) for ids in batch] if add_special_tokens else batch

    def encode_with_offsets(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> tuple[list[int], list[int]]:
        """Ids, and for each the index in `text` of the character that its first byte belongs to.

        Tokens that begin inside one character have the same offset. Equal to tiktoken's `decode_with_offsets`. Where a
        normalizer changed the text, a token that begins inside what it changed has the offset of the change.
        """
        finder, refused = self._policy.resolve(allowed_special, disallowed_special)
        if self._is_direct:
            ids = self._encode(text, finder, refused)
            return ids, self._native.offsets(ids)
        text = without_surrogates(text)
        refused.refuse(text)
        ids, offsets = [], []
        for section in self._policy.splitter(allowed_special).split(text, with_origins=True):
            found, places = ([section.id], [0]) if section.id is not None else self._encode_with_offsets(section)
            ids += found
            offsets += [section.source_index(place) for place in places]
        return ids, offsets

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that may not be UTF-8, with no regard to special tokens. Decoding gives `data` back.

        Up to the first byte that is not UTF-8 this is `encode_ordinary`; from the start of the pre-token before it (and
        of the white space that this ends, if it does) the rest is merged as one piece, as tiktoken does: a text cut
        inside a character keeps the ids that it would have had. O(n log n) in the length of that rest. With a
        normalizer or added tokens that are not special, text between invalid bytes is encoded on its own instead.

        Raises:
            TokenizerError: a byte that is not UTF-8 has no token.
        """
        try:
            return self.encode_ordinary(data.decode())
        except UnicodeDecodeError as error:
            valid = error.start
        lacking = next((byte for byte in {*data} if bytes([byte]) not in self.mergeable_ranks), None)
        if lacking is not None:
            raise TokenizerError(f"byte 0x{lacking:02x} has no token in {self.name or 'this vocabulary'}")
        if not self._policy.is_plain or len(self.added_tokens) > len(self.special_tokens):
            return [i for part in utf8_runs(data) for i in self._encode_run(part)]
        pieces = self._pretokenize(data[:valid].decode())
        ids = [i for piece in pieces for i in self._native.encode_piece(piece)]
        unstable = len(self._native.encode_piece(pieces[-1])) if pieces else 0
        if unstable and self._is_blank(ids[-unstable]):
            while unstable < len(ids) and self._is_blank(ids[-unstable - 1]):
                unstable += 1
        stable = ids[: len(ids) - unstable]
        return stable + self._native.encode_piece(self.decode_bytes(ids[len(stable) :]) + data[valid:])

    def decode(self, ids: Iterable[int], errors: str = "replace", *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`. `errors` says what to do with bytes that are not UTF-8, as in `bytes.decode`.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        if skip_special_tokens:
            special = set(self.special_tokens.values())
            ids = [i for i in ids if int(i) not in special]
        return self.decode_bytes(ids).decode("utf-8", errors)

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
        """SHA-256 (hex) over all that decides ids: equal when ids are equal on every text."""
        from fastlm.tokenizer.fingerprint import fingerprint

        return fingerprint(self)

    def _build(self) -> Any:
        merges = None
        if self.merges is not None:
            try:
                merges = [(self.mergeable_ranks[left], self.mergeable_ranks[right]) for left, right in self.merges]
            except KeyError as error:
                raise TokenizerError(f"merges use {error}, which is no token") from None
        pattern = "" if self._regex is not None else self.pattern
        ordinary = set(self.mergeable_ranks.values())
        added = {self.settings.found_as(t): t.id for t in self.added_tokens if t.special or t.id not in ordinary}
        added |= dict(self.settings.unreachable)
        try:
            return native().BpeEncoder(self.mergeable_ranks, merges, pattern, added)
        except TokenizerError:
            raise
        except ValueError as error:
            raise TokenizerError(f"this vocabulary cannot be used: {error}") from None

    def _plain_special_tokens(self) -> dict[str, int]:
        of_settings = set(self.settings.added_tokens)
        return {token.content: token.id for token in self.added_tokens if token not in of_settings}

    def _surround(self, ids: list[int]) -> list[int]:
        return [*self.settings.prefix_ids, *ids, *self.settings.suffix_ids]

    def _encode(self, text: str, finder: Any, refused: Any) -> list[int]:
        if not self._is_direct:
            return self._encode_parts(self._parts(text, finder, refused))
        try:
            return self._native.encode(text, finder, refused)
        except UnicodeEncodeError:
            return self._native.encode(without_surrogates(text), finder, refused)

    def _parts(self, text: str, finder: Any, refused: Any) -> list[str | int]:
        """Text between added tokens, normalized, and the ids of those tokens, in order."""
        text = without_surrogates(text)
        refused.refuse(text)
        if self._unencodable is not None and (found := self._unencodable.search(text)):
            raise TokenizerError(f"{self.name or 'this vocabulary'} has no tokens for the character {found.group()!r}")
        if self._policy.is_plain:
            return finder.split(text)
        return [section.text if section.id is None else section.id for section in finder.split(text)]

    def _encode_parts(self, parts: list[str | int]) -> list[int]:
        ids: list[int] = []
        nothing = self._policy.refuse_none
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif self._regex is None:
                ids += self._native.encode(part, nothing, nothing)
            else:
                for piece in self._regex.split(part):
                    ids += self._native.encode_piece(piece.encode())
        return ids

    def _encode_parts_to_numpy(self, parts: list[str | int]) -> npt.NDArray[np.uint32]:
        return np.array(self._encode_parts(parts), dtype=np.uint32)

    def _encode_parts_batch(self, batch: list[list[str | int]], num_threads: int) -> list[list[int]]:
        return [self._encode_parts(parts) for parts in batch]

    def _encode_with_offsets(self, section: Section) -> tuple[list[int], list[int]]:
        """Ids of a section of text, and where in it each begins."""
        ids = self._encode_parts([section.text])
        return ids, self._native.offsets(ids)

    def _encode_run(self, run: str | bytes) -> list[int]:
        return self.encode_ordinary(run) if isinstance(run, str) else self._native.encode_piece(run)

    def _pretokenize(self, text: str) -> list[bytes]:
        if self._regex is None:
            return native().pretokenize(self.pattern, text.encode())
        return [piece.encode() for piece in self._regex.split(text)]

    def _is_blank(self, id: int) -> bool:
        return not self.token_bytes(id).strip(b" \n\t")


def _rebuild(ranks: dict[bytes, int], arguments: dict[str, Any]) -> Tokenizer:
    return Tokenizer(ranks, **arguments)


def _characters_of(lead_bytes: Iterable[int]) -> re.Pattern[str] | None:
    """Finds the characters whose UTF-8 begins with one of 0xF1 … 0xF4, which a vocabulary may lack."""
    first = [(byte - 0xF0) << 18 for byte in lead_bytes]
    ranges = [f"{chr(code)}-{chr(min(code + 0x3FFFF, 0x10FFFF))}" for code in first]
    return re.compile(f"[{''.join(ranges)}]") if ranges else None


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
