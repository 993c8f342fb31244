r"""Regular expressions that mean the same to Oniguruma, the engine of `tokenizers`, and to the `regex` package.

`to_regex` rewrites one for the other (`$` ends a line there), and refuses what the two read differently: `\w` and `\b`
take in other characters, `{1,3}+` repeats there and is possessive here, folding case may span several characters.
Reference: github.com/kkos/oniguruma, doc/RE and doc/SYNTAX.md (Ruby syntax).
"""

from __future__ import annotations

import regex

from fastlm.errors import TokenizerError

_TOKEN = regex.compile(
    r"""
    (?P<property>\\[pP]\{[A-Za-z_]+\})
  | (?P<escape>\\(?:[rntfv]|[sSdD]|u[0-9a-fA-F]{4}|[^A-Za-z0-9\n\s]))
  | (?P<set>\[\^?(?:\\(?:[rntfvsSdD]|u[0-9a-fA-F]{4}|[pP]\{[A-Za-z_]+\}|[^A-Za-z0-9\n\s])|&(?!&)|[^\[\]\\&])+\])
  | (?P<fold>\(\?i:)
  | (?P<open>\((?:\?(?:[:!=>]|<=|<!))?)
  | (?P<close>\))
  | (?P<repeat>(?:[*+?]|\{\d+(?:,\d*)?\}))
  | (?P<end>\$)
  | (?P<or>\|)
  | (?P<literal>[^\\\[\](){}^$*+?|])
    """,
    regex.VERBOSE,
)
# Two letters that fold to one character (ß, ﬀ, ﬁ, ﬂ, ﬅ, ŉ, ǰ, ẖ, ẗ, ẘ, ẙ, ẚ): Oniguruma matches that, regex does not.
_FOLDS_TOGETHER = regex.compile(r"ss|f[fil]|st|ʼn|[jhtwya][\u0300-\u036f\u02be]", regex.IGNORECASE)


def to_regex(pattern: str) -> str:
    """`pattern`, written for Oniguruma, as the `regex` package understands it.

    Raises:
        TokenizerError: names the first construct that the two engines do not read alike, or what does not compile.
    """
    out: list[str] = []
    kinds: list[str] = []
    folds: list[bool] = []  # for each open group, whether it folds case
    at = 0
    while at < len(pattern):
        match = _TOKEN.match(pattern, at)
        kind = match.lastgroup if match else None
        text = match.group() if match else pattern[at : at + 8]
        previous = kinds[-1] if kinds else ""
        if kind is None or (kind == "repeat" and not _may_repeat(text, out, kinds)):
            raise _refusal(pattern, (out[-1] if kind == "repeat" and out else "") + text)
        if kind in ("open", "fold"):
            folds.append(kind == "fold" or (bool(folds) and folds[-1]))
        elif kind == "close" and folds:
            folds.pop()
        elif folds and folds[-1] and not (text.isascii() and (kind not in ("set", "property") or text[1:-1].isalpha())):
            raise _refusal(pattern, f"(?i:…{text}…)")
        elif folds and folds[-1] and previous == "literal" and _FOLDS_TOGETHER.search(out[-1] + text):
            raise _refusal(pattern, f"(?i:…{out[-1]}{text}…)")
        out.append(r"(?=\n|\Z)" if kind == "end" else text)
        kinds.append(kind)
        at += len(text)
    translated = "".join(out)
    try:
        regex.compile(translated)
    except regex.error as error:
        raise TokenizerError(f"the pattern {pattern!r:.60} is no regular expression: {error}") from None
    return translated


def _may_repeat(text: str, out: list[str], kinds: list[str]) -> bool:
    """False for a repeat of nothing, of a position, or of a repeat where the engines differ."""
    if not kinds or kinds[-1] in ("open", "fold", "or", "end"):
        return False
    if kinds[-1] == "repeat":  # lazy or possessive
        return text in ("?", "+") and out[-1] in ("*", "+", "?") and (len(kinds) < 2 or kinds[-2] != "repeat")
    return True


def _refusal(pattern: str, construct: str) -> TokenizerError:
    return TokenizerError(f"the pattern {pattern!r:.60} is not supported: {construct!r:.40} differs between engines")
