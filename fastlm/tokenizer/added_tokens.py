"""Tokens that are found in text before it is split, and what a vocabulary file says of text around them.

The rules are those of `tokenizers` (tokenizer/added_vocabulary.rs): tokens that are not `normalized` are found in the
text as it is, the text between them is normalized, and the `normalized` ones are found in that. At one place the
longest token counts. A `single_word` token inside a word is passed over. `lstrip` and `rstrip` take in the white space
beside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import regex

from fastlm._core import native
from fastlm.tokenizer.normalizers import Normalizer

# What Rust's regular expressions call a word character.
_WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
_SPACE_AFTER = regex.compile(r"\p{White_Space}*")


@dataclass(frozen=True)
class AddedToken:
    """A string that becomes one id wherever it stands in text.

    `special` ones steer a model, so text makes them only when it is allowed to; the others it always makes.
    """

    content: str
    id: int
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is just a string to be found in the text as it is."""
        return not (self.single_word or self.lstrip or self.rstrip or self.normalized)


@dataclass(frozen=True)
class Settings:
    """What a vocabulary file says besides its vocabulary and its pattern."""

    added_tokens: tuple[AddedToken, ...] = ()
    """Those that are not special or not plain; plain special ones may be among `special_tokens` instead."""
    normalizer: Normalizer | None = None
    unreachable: tuple[tuple[str, int], ...] = ()
    """Entries of the vocabulary that no text makes; they decode to themselves."""
    prefix_ids: tuple[int, ...] = ()
    """Put before the ids of a text by `add_special_tokens`, such as the id of `<bos>`."""
    suffix_ids: tuple[int, ...] = ()
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = None

    def found_as(self, token: AddedToken) -> str:
        """What `token` is in normalized text: what its id decodes to."""
        return (self.normalizer(token.content) if token.normalized and self.normalizer else "") or token.content


@dataclass(frozen=True)
class Section:
    """Text between added tokens, or one of those tokens."""

    begin: int
    """Of the section in the source text."""
    text: str
    """Normalized."""
    id: int | None = None
    """The token's; None for text."""
    origins: list[int] | None = field(default=None, compare=False)
    """For each character of `text` its index in the source; None when the section is the source's own."""

    def source_index(self, character: int) -> int:
        """Index in the source text of a character of `text`."""
        if self.origins is None:
            return self.begin + character
        return self.origins[min(character, len(self.origins) - 1)] if self.origins else self.begin


class Splitter:
    """Cuts a text at the added tokens that are given and normalizes the rest."""

    def __init__(self, tokens: Iterable[AddedToken], normalizer: Normalizer | None) -> None:
        tokens = list(tokens)
        self._normalizer = normalizer
        self._before = _Finder([(token.content, token) for token in tokens if not token.normalized])
        self._after = _Finder([(normalizer(t.content) if normalizer else t.content, t) for t in tokens if t.normalized])

    def split(self, text: str, *, with_origins: bool = False) -> list[Section]:
        """The sections of `text` in order; `with_origins` fills `Section.origins` where normalizing changed it."""
        sections: list[Section] = []
        for begin, end, token in self._before.cut(text):
            if token is not None:
                sections.append(Section(begin, text[begin:end], token.id))
                continue
            origins = None
            normalized = text[begin:end]
            if self._normalizer:
                source = normalized
                if with_origins:
                    normalized, indices = self._normalizer.align(source)
                    origins = [begin + i for i in indices]
                else:
                    normalized = self._normalizer(source)
                if normalized == source:
                    origins = None
            for b, e, found in self._after.cut(normalized):
                sections.append(
                    Section(
                        begin + b if origins is None else origins[b] if b < len(origins) else begin,
                        normalized[b:e],
                        None if found is None else found.id,
                        origins and origins[b:e],
                    )
                )
        return sections


class _Finder:
    def __init__(self, tokens: list[tuple[str, AddedToken]]) -> None:
        self._tokens = [(content, token) for content, token in tokens if content]
        self._matcher = native().SpecialTokens([(content, i) for i, (content, _) in enumerate(self._tokens)])

    def cut(self, text: str) -> list[tuple[int, int, AddedToken | None]]:
        """(begin, end, token or None) of the parts of `text`, none of them empty unless it is a token."""
        if not self._tokens:
            return [(0, len(text), None)] if text else []
        parts: list[tuple[int, int, AddedToken | None]] = []
        done = at = 0
        for part in self._matcher.split(text):
            if isinstance(part, str):
                at += len(part)
                continue
            content, token = self._tokens[part]
            begin, end = at, at + len(content)
            at = end
            if token.single_word and (
                (begin > 0 and _WORD.match(text[begin - 1])) or (end < len(text) and _WORD.match(text[end]))
            ):
                continue
            if token.lstrip:
                begin = max(done, _space_before(text, begin))
            if token.rstrip:
                match: Any = _SPACE_AFTER.match(text, end)
                end = match.end()
            if done < begin:
                parts.append((done, begin, None))
            parts.append((begin, end, token))
            done = end
        if done < len(text):
            parts.append((done, len(text), None))
        return parts


def _space_before(text: str, end: int) -> int:
    while end and _SPACE_AFTER.fullmatch(text[end - 1]):
        end -= 1
    return end


def one_pass(tokens: Iterable[AddedToken]) -> bool:
    """Whether finding all tokens at once is the same as finding the `normalized` ones after the others.

    It is, without a normalizer, when no token of the one kind overlaps with one of the other.
    """
    tokens = list(tokens)
    early = [token.content for token in tokens if not token.normalized]
    late = [token.content for token in tokens if token.normalized]
    return not any(_may_overlap(a, b) for a in late for b in early)


def _may_overlap(a: str, b: str) -> bool:
    if a in b or b in a:
        return True
    return any(a[-n:] == b[:n] or b[-n:] == a[:n] for n in range(1, min(len(a), len(b))))
