"""Normalizers of `tokenizer.json`: what becomes of a text before it is split.

Each does what `tokenizers` does (huggingface.co/docs/tokenizers), character by character where it works so: lower case
does not look at neighbours, and white space is Unicode's White_Space. The Unicode forms are Python's `unicodedata`;
they differ from theirs only on characters newer than either's Unicode.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, TypeAlias, get_args

import regex

from fastlm.errors import TokenizerError
from fastlm.tokenizer.portable_regex import to_regex

Form: TypeAlias = Literal["NFC", "NFD", "NFKC", "NFKD"]

_WHITE_SPACE = "".join(
    map(chr, [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000])
)

# A text and, for each of its characters, the index of the one that it comes from.
Aligned: TypeAlias = tuple[str, list[int]]


class Normalizer:
    """One normalizer or a sequence of them, as `tokenizer.json` writes it.

    Raises:
        TokenizerError: a kind or an option that is not supported (named).
    """

    def __init__(self, definition: dict[str, Any]) -> None:
        self.definition = definition
        self._steps = [_step(part) for part in _flatten(definition)]

    def __call__(self, text: str) -> str:
        for step in self._steps:
            text = step.apply(text)
        return text

    def align(self, text: str) -> Aligned:
        """The normalized text, and for each of its characters the index in `text` of the one that it comes from.

        A character that stands for several has the index of the first of them.
        """
        origins = list(range(len(text)))
        for step in self._steps:
            text, indices = step.align(text)
            origins = [origins[i] if origins else 0 for i in indices]
        return text, origins

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Normalizer) and self.definition == other.definition

    def __hash__(self) -> int:
        return hash(repr(self.definition))


class _UnicodeForm:
    def __init__(self, form: Form) -> None:
        self.form: Form = form

    def apply(self, text: str) -> str:
        return text if text.isascii() else unicodedata.normalize(self.form, text)

    def align(self, text: str) -> Aligned:
        if unicodedata.is_normalized(self.form, text):
            return text, list(range(len(text)))
        out: list[str] = []
        origins: list[int] = []
        begin = 0
        joins = _joins_backward()
        for end in range(1, len(text) + 1):
            if end < len(text) and (unicodedata.combining(text[end]) or text[end] in joins):
                continue
            source = text[begin:end]
            made = unicodedata.normalize(self.form, source)
            out.append(made)
            origins += [
                begin + min(i, len(source) - 1) if len(made) == len(source) else begin for i in range(len(made))
            ]
            begin = end
        return "".join(out), origins


class _Characters:
    """A change of each character on its own; None removes it."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self.change = change

    def apply(self, text: str) -> str:
        return "".join(map(self.change, text))

    def align(self, text: str) -> Aligned:
        made = [self.change(char) for char in text]
        return "".join(made), [i for i, chars in enumerate(made) for _ in chars]


class _Strip:
    def __init__(self, left: bool, right: bool) -> None:
        self.left = left
        self.right = right

    def apply(self, text: str) -> str:
        if self.left:
            text = text.lstrip(_WHITE_SPACE)
        return text.rstrip(_WHITE_SPACE) if self.right else text

    def align(self, text: str) -> Aligned:
        begin = len(text) - len(text.lstrip(_WHITE_SPACE)) if self.left else 0
        made = self.apply(text)
        return made, list(range(begin, begin + len(made)))


class _Prepend:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def apply(self, text: str) -> str:
        return self.prefix + text if text else text

    def align(self, text: str) -> Aligned:
        made = self.apply(text)
        return made, [0] * (len(made) - len(text)) + list(range(len(text)))


class _Replace:
    def __init__(self, pattern: regex.Pattern[str], content: str) -> None:
        self.pattern = pattern
        self.content = content

    def apply(self, text: str) -> str:
        return self.pattern.sub(lambda _: self.content, text)

    def align(self, text: str) -> Aligned:
        out: list[str] = []
        origins: list[int] = []
        end = 0
        for match in self.pattern.finditer(text):
            out += [text[end : match.start()], self.content]
            origins += range(end, match.start())
            origins += [match.start()] * len(self.content)
            end = match.end()
        out.append(text[end:])
        return "".join(out), [*origins, *range(end, len(text))]


_Step: TypeAlias = "_UnicodeForm | _Characters | _Strip | _Prepend | _Replace"


def _flatten(definition: Any) -> list[dict[str, Any]]:
    if not isinstance(definition, dict):
        raise TokenizerError(f"normalizer {definition!r:.40} is not an object")
    if definition.get("type") != "Sequence":
        return [definition]
    parts = definition.get("normalizers")
    if not isinstance(parts, list):
        raise TokenizerError("normalizer Sequence has no list of normalizers")
    return [step for part in parts for step in _flatten(part)]


def _step(definition: dict[str, Any]) -> _Step:
    kind = definition.get("type")
    for form in get_args(Form):
        if kind == form:
            return _UnicodeForm(form)
    if kind == "Lowercase":
        return _Characters(str.lower)
    if kind == "StripAccents":
        return _Characters(lambda char: "" if unicodedata.category(char)[0] == "M" else char)
    if kind == "Strip":
        left, right = definition.get("strip_left", True), definition.get("strip_right", True)
        if isinstance(left, bool) and isinstance(right, bool):
            return _Strip(left, right)
    if kind == "Prepend" and isinstance(definition.get("prepend"), str):
        return _Prepend(definition["prepend"])
    if kind == "Replace" and isinstance(definition.get("content"), str):
        return _Replace(_pattern(definition.get("pattern")), definition["content"])
    known = ("Strip", "Prepend", "Replace")
    raise TokenizerError(f"normalizer {kind!r:.40} is not {'well-formed' if kind in known else 'supported'}")


def _pattern(value: Any) -> regex.Pattern[str]:
    kind, text = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (None, None)
    if isinstance(text, str) and text and kind in ("String", "Regex"):
        return regex.compile(regex.escape(text, special_only=True) if kind == "String" else to_regex(text))
    raise TokenizerError(f"normalizer Replace with the pattern {value!r:.60} is not supported")


@cache
def _joins_backward() -> frozenset[str]:
    """Characters that are no combining marks and still become part of what stands before them, by canonical rules."""
    found = {chr(code) for code in [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]}  # Hangul vowels and finals
    for code in [*range(0x10000), *range(0x10000, 0x20000)]:
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            second = chr(int(parts[1], 16))
            if not unicodedata.combining(second):
                found.add(second)
    return frozenset(found)
