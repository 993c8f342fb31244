"""One text cut at six sizes: character, word, subword, morpheme, sentence, paragraph.

Every function takes a text and returns its units in order. Korean morphemes and sentences come from kiwipiepy
(github.com/bab2min/kiwipiepy), which the extra `fastlm[korean]` installs. The rest needs nothing more.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import regex

from fastlm.errors import DataError, FastlmError

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer

GRANULARITIES = ("character", "word", "subword", "morpheme", "sentence", "paragraph")

_GRAPHEME = regex.compile(r"\X")
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]+(?:['’.,][\p{L}\p{M}\p{N}_]+)*|\S")
_HANGUL = regex.compile(r"\p{Hangul}")
_BLANK_LINE = regex.compile(r"(?:\r\n?|\n)[^\S\r\n]*(?:\r\n?|\n)\s*")
# White space after ., !, ?, or … with closing quotes and brackets, before what can begin a sentence.
_SENTENCE_END = regex.compile(r"(?<=[.!?…][\"'”’)\]]{0,3})\s+(?=[\"'“‘(\[]{0,2}[\p{Lu}\p{Lt}\p{Lo}\p{N}])")
_ABBREVIATION = regex.compile(
    r"(?:^|[\s(\[\"“])(?:Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Gen|Col|Capt|Lt|Rev|Hon|Mt|vs|No|Fig|Eq|Vol|pp|cf|approx|"
    r"Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|e\.g|i\.e|\p{Lu}(?:\.\p{Lu})*)\.$"
)


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
    ids = tokenizer.encode(text, allowed_special="all")
    return [tokenizer.token_bytes(i).decode(errors="backslashreplace") for i in ids]


def morphemes(text: str) -> list[str]:
    """Morphemes of Korean text as stems, particles and endings ("갔다" is 가, 었, 다), by kiwipiepy.

    Words in Latin letters inside Korean text stay whole. There is no morpheme analysis of other languages.

    Raises:
        DataError: the text holds no Hangul.
        FastlmError: kiwipiepy is not installed.
    """
    if not _HANGUL.search(text):
        raise DataError("morphemes are found in Korean text only, and this text holds no Hangul; use subword instead")
    return [token.form for token in _kiwi().tokenize(text)]


def sentences(text: str) -> list[str]:
    """Sentences without the white space around them; a blank line always ends one.

    A paragraph with Hangul is split by kiwipiepy. Any other by rule: at white space after ".", "!", "?" or "…" (and
    closing quotes or brackets) when a capital, a digit or a caseless letter follows, save after common English
    abbreviations and initials ("Dr. Kim", "J. S. Bach").

    Raises:
        FastlmError: the text holds Hangul and kiwipiepy is not installed.
    """
    found: list[str] = []
    for paragraph in paragraphs(text):
        if _HANGUL.search(paragraph):
            found += [sentence.text.strip() for sentence in _kiwi().split_into_sents(paragraph)]
        else:
            found += _split_by_rule(paragraph)
    return [sentence for sentence in found if sentence]


def paragraphs(text: str) -> list[str]:
    """What blank lines separate, without the white space around it."""
    return [part for part in map(str.strip, _BLANK_LINE.split(text)) if part]


def _split_by_rule(paragraph: str) -> list[str]:
    found = []
    begin = 0
    for gap in _SENTENCE_END.finditer(paragraph):
        # An abbreviation is short, so only the last characters are looked at.
        if not _ABBREVIATION.search(paragraph[max(begin, gap.start() - 12) : gap.start()]):
            found.append(paragraph[begin : gap.start()])
            begin = gap.end()
    return [*found, paragraph[begin:]]


@cache
def _kiwi() -> Any:
    try:
        from kiwipiepy import Kiwi
    except ImportError:
        raise FastlmError(
            'Korean morphemes and sentences need kiwipiepy; install it with: pip install "fastlm[korean]"'
        ) from None
    return Kiwi()
