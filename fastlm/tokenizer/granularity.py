"""One text cut at any size: code point, character, word, subword, morpheme, sentence, paragraph.

`split` gives the units with their places in the text; the functions named after the sizes give their strings. Korean
morphemes and sentences come from kiwipiepy (github.com/bab2min/kiwipiepy), which the extra `fastlm[korean]` installs.
The rest needs nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import regex

from fastlm.errors import DataError, FastlmError

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer

GRANULARITIES = ("character", "word", "subword", "morpheme", "sentence", "paragraph")
OTHER_GRANULARITIES = ("code-point", "whitespace")

_GRAPHEME = regex.compile(r"\X")
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]+(?:['’.,][\p{L}\p{M}\p{N}_]+)*|\S")
_NOT_BLANK = regex.compile(r"\S+")
_HANGUL = regex.compile(r"\p{Hangul}")
_BLANK_LINE = regex.compile(r"(?:\r\n?|\n)[^\S\r\n]*(?:\r\n?|\n)\s*")
# White space after ., !, ?, or … with closing quotes and brackets, before what can begin a sentence.
_SENTENCE_END = regex.compile(r"(?<=[.!?…][\"'”’)\]]{0,3})\s+(?=[\"'“‘(\[]{0,2}[\p{Lu}\p{Lt}\p{Lo}\p{N}])")
_ABBREVIATION = regex.compile(
    r"(?:^|[\s(\[\"“])(?:Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Gen|Col|Capt|Lt|Rev|Hon|Mt|vs|No|Fig|Eq|Vol|pp|cf|approx|"
    r"Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|e\.g|i\.e|\p{Lu}(?:\.\p{Lu})*)\.$"
)


@dataclass(frozen=True)
class Unit:
    """A piece of a text and where it is: characters `begin` to `end` of the text.

    `text` is that part of it, save for a morpheme, which is in its basic form, and a subword of half a character.
    """

    text: str
    begin: int
    end: int
    id: int | None = None
    """A subword's."""
    tag: str | None = None
    """A morpheme's part of speech, as kiwipiepy names it (NNG a common noun, JKS a subject particle)."""


def split(text: str, by: str, tokenizer: Tokenizer | None = None) -> list[Unit]:
    """The units of `text` in order.

    Args:
        by: one of `GRANULARITIES`, or "code-point" or "whitespace" (what white space separates; in Korean an eojeol
            with its punctuation).
        tokenizer: what "subword" needs.

    Raises:
        DataError: there is no such size, "subword" without a tokenizer, or "morpheme" of a text without Hangul.
        FastlmError: kiwipiepy is needed and not installed.
    """
    if by == "subword":
        if tokenizer is None:
            raise DataError("subwords are a tokenizer's; pass one")
        return _subwords(text, tokenizer)
    functions = {
        "code-point": lambda: [Unit(char, i, i + 1) for i, char in enumerate(text)],
        "character": lambda: _matches(_GRAPHEME, text),
        "word": lambda: _matches(_WORD, text),
        "whitespace": lambda: _matches(_NOT_BLANK, text),
        "morpheme": lambda: _morphemes(text),
        "sentence": lambda: _sentences(text),
        "paragraph": lambda: _paragraphs(text),
    }
    if by not in functions:
        raise DataError(f"no units named {by!r}; there are {', '.join([*GRANULARITIES, *OTHER_GRANULARITIES])}")
    return functions[by]()


def characters(text: str) -> list[str]:
    """What a reader counts as characters: extended grapheme clusters (Unicode Annex 29), so 👩‍👩‍👧 is one."""
    return _GRAPHEME.findall(text)


def code_points(text: str) -> list[str]:
    """Unicode code points, Python's own characters."""
    return list(text)


def words(text: str) -> list[str]:
    """Runs of letters, marks, digits and underscores; every other visible character stands alone.

    An apostrophe, point or comma between two such characters joins them ("don't", "3.14"). In Korean a word is an
    eojeol, without its punctuation.
    """
    return _WORD.findall(text)


def subwords(text: str, tokenizer: Tokenizer) -> list[str]:
    r"""The tokenizer's tokens, special ones included. Bytes that are not whole characters are shown as `\xea`."""
    return _texts(_subwords(text, tokenizer))


def morphemes(text: str) -> list[str]:
    """Morphemes of Korean text as stems, particles and endings ("갔다" is 가, 었, 다), by kiwipiepy.

    Words in Latin letters inside Korean text stay whole. There is no morpheme analysis of other languages.

    Raises:
        DataError: the text holds no Hangul.
        FastlmError: kiwipiepy is not installed.
    """
    return _texts(_morphemes(text))


def sentences(text: str) -> list[str]:
    """Sentences without the white space around them; a blank line always ends one.

    A paragraph with Hangul is split by kiwipiepy. Any other by rule: at white space after ".", "!", "?" or "…" (and
    closing quotes or brackets) when a capital, a digit or a caseless letter follows, save after common English
    abbreviations and initials ("Dr. Kim", "J. S. Bach").

    Raises:
        FastlmError: the text holds Hangul and kiwipiepy is not installed.
    """
    return _texts(_sentences(text))


def paragraphs(text: str) -> list[str]:
    """What blank lines separate, without the white space around it."""
    return _texts(_paragraphs(text))


def _texts(units: Iterable[Unit]) -> list[str]:
    return [unit.text for unit in units]


def _matches(pattern: regex.Pattern[str], text: str) -> list[Unit]:
    return [Unit(match.group(), *match.span()) for match in pattern.finditer(text)]


def _subwords(text: str, tokenizer: Tokenizer) -> list[Unit]:
    """A character that several tokens make belongs to the place of each of them."""
    ids, begins = tokenizer.encode_with_offsets(text, allowed_special="all")
    ends = [max(begin + 1, after) for begin, after in zip(begins, [*begins[1:], len(text)], strict=False)]
    return [
        Unit(tokenizer.token_bytes(i).decode(errors="backslashreplace"), begin, min(end, len(text)), id=i)
        for i, begin, end in zip(ids, begins, ends, strict=True)
    ]


def _morphemes(text: str) -> list[Unit]:
    if not _HANGUL.search(text):
        raise DataError("morphemes are found in Korean text only, and this text holds no Hangul; use subword instead")
    return [Unit(token.form, token.start, token.end, tag=str(token.tag)) for token in _kiwi().tokenize(text)]


def _sentences(text: str) -> list[Unit]:
    found: list[Unit] = []
    for paragraph in _paragraphs(text):
        if _HANGUL.search(paragraph.text):
            spans = [(sentence.start, sentence.end) for sentence in _kiwi().split_into_sents(paragraph.text)]
        else:
            spans = _spans_by_rule(paragraph.text)
        found += [_stripped(text, paragraph.begin + begin, paragraph.begin + end) for begin, end in spans]
    return [sentence for sentence in found if sentence.text]


def _paragraphs(text: str) -> list[Unit]:
    gaps = [match.span() for match in _BLANK_LINE.finditer(text)]
    begins, ends = [0, *(end for _, end in gaps)], [*(begin for begin, _ in gaps), len(text)]
    found = [_stripped(text, begin, end) for begin, end in zip(begins, ends, strict=True)]
    return [paragraph for paragraph in found if paragraph.text]


def _stripped(text: str, begin: int, end: int) -> Unit:
    part = text[begin:end].lstrip()
    begin = end - len(part)
    part = part.rstrip()
    return Unit(part, begin, begin + len(part))


def _spans_by_rule(paragraph: str) -> list[tuple[int, int]]:
    found = []
    begin = 0
    for gap in _SENTENCE_END.finditer(paragraph):
        # An abbreviation is short, so only the last characters are looked at.
        if not _ABBREVIATION.search(paragraph[max(begin, gap.start() - 12) : gap.start()]):
            found.append((begin, gap.start()))
            begin = gap.end()
    return [*found, (begin, len(paragraph))]


@cache
def _kiwi() -> Any:
    try:
        from kiwipiepy import Kiwi
    except ImportError:
        raise FastlmError(
            'Korean morphemes and sentences need kiwipiepy; install it with: pip install "fastlm[korean]"'
        ) from None
    return Kiwi()
