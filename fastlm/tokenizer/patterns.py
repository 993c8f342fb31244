r"""How text is split before merging: the patterns by name, and the regular expressions that they were published as.

A pattern is one regular expression or several that are applied in turn, each to the pieces that the one before it left.
Matches and what lies between them are pieces of their own, as with the "Isolated" splits of `tokenizers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import regex

from fastlm.errors import TokenizerError

Pattern: TypeAlias = "str | Sequence[str]"

PATTERN_NAMES = ("gpt2", "cl100k", "o200k", "llama3", "qwen2")
"""Those that have a native scanner."""

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2_PUBLISHED = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

REGEXES = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama3": (
        _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""As tiktoken (gpt2, cl100k, o200k), Meta (llama3) and Alibaba (qwen2) publish them; the scanners equal these."""

_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASIA = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
# Latin, Greek, Cyrillic, Armenian, Georgian, Cherokee and other letters with case. By number, since some look alike.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
PUNCTUATION = r"[!-/:-@\[-`{-~\p{P}]"
"""What the Punctuation step of `tokenizers` takes for one: ASCII's and category P."""

SEQUENCES = {
    "starcoder": (r"\p{N}", REGEXES["gpt2"]),
    "deepseek-llm": (
        "[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+(?=\n|\Z)",
        _ASIA,
        r"\p{N}",
    ),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIA, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", _CJK, _DEEPSEEK3),
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "qwen3.5": (
        _CONTRACTION
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "exaone-moe": (
        _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
}
"""As StarCoder (EXAONE 3, Command R), DeepSeek, Mistral, Alibaba and LG publish them; split by `regex`."""

_EARLIER_FORMS = {
    _GPT2_PUBLISHED: "gpt2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
}
_NAME_OF = (
    {(expression,): name for name, expression in REGEXES.items()}
    | {(expression,): name for expression, name in _EARLIER_FORMS.items()}
    | {steps: name for name, steps in SEQUENCES.items()}
)


def name_of_pattern(pattern: Pattern) -> str | tuple[str, ...]:
    """The name of a published pattern. Another regular expression as it is, and others as a tuple."""
    steps = (pattern,) if isinstance(pattern, str) else tuple(pattern)
    if len(steps) > 1:
        steps = tuple(REGEXES["gpt2"] if step in (*_EARLIER_FORMS, "gpt2") else step for step in steps)
    return _NAME_OF.get(steps, steps[0] if len(steps) == 1 else steps)


class RegexSplitter:
    """Splits by a pattern that has no native scanner.

    Raises:
        TokenizerError: what is neither the name of a pattern nor a regular expression.
    """

    def __init__(self, pattern: str | tuple[str, ...]) -> None:
        steps = SEQUENCES.get(pattern, (pattern,)) if isinstance(pattern, str) else pattern
        self._steps = [_compile(step) for step in steps]

    def split(self, text: str) -> list[str]:
        """The pieces of `text` in order, none empty; together they are the text."""
        pieces = [text]
        for step in self._steps:
            pieces = [found for piece in pieces for found in _split(step, piece)]
        return [piece for piece in pieces if piece]


def _split(step: regex.Pattern[str], text: str) -> list[str]:
    if not step.groups:
        found: list[str] = step.findall(text)
        if sum(map(len, found)) == len(text):
            return found
    pieces = []
    end = 0
    for match in step.finditer(text):
        pieces += [text[end : match.start()], match.group()]
        end = match.end()
    return [*pieces, text[end:]]


def _compile(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise TokenizerError(
            f"the pattern {pattern!r:.80} is neither a name ({', '.join([*PATTERN_NAMES, *SEQUENCES])}) nor a regular "
            f"expression: {error}"
        ) from None
