"""Which added tokens a text may make, by tiktoken's rules: allowed, disallowed, and those that are not special."""

from __future__ import annotations

from collections.abc import Collection, Set
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias

from fastlm._core import native
from fastlm.errors import TokenizerError
from fastlm.tokenizer.added_tokens import AddedToken, Settings, Splitter, one_pass
from fastlm.tokenizer.unicode_text import is_unicode

AllowedSpecial: TypeAlias = "Literal['all'] | Set[str]"
DisallowedSpecial: TypeAlias = "Literal['all'] | Collection[str]"

MAX_ID = (1 << 24) - 1  # as the native core has it: sixty times the largest vocabularies in use


class SpecialPolicy:
    """Turns the arguments `allowed_special` and `disallowed_special` into what finds the one and refuses the other."""

    def __init__(self, added_tokens: tuple[AddedToken, ...], settings: Settings) -> None:
        for token in added_tokens:
            kind = "special token" if token.special else "added token"
            if not token.content or not is_unicode(token.content):
                fault = "holds surrogates" if token.content else "is empty"
                raise TokenizerError(f"a {kind} {fault}: {token.content!r:.60}")
            if not 0 <= token.id <= MAX_ID:
                raise TokenizerError(
                    f"{kind} {token.content!r:.60} has the id {token.id}, which is not in 0 … {MAX_ID}"
                )
        self.special_tokens = {token.content: token.id for token in added_tokens if token.special}
        self.is_plain = not settings.normalizer and (
            all(token.is_plain for token in added_tokens)
            or (all(replace(t, normalized=False).is_plain for t in added_tokens) and one_pass(added_tokens))
        )
        """Whether tokens are mere strings and text between them stays as it is: a native matcher finds them then."""
        self._added_tokens = added_tokens
        self._settings = settings
        self._find = lru_cache(maxsize=64)(self._make_finder)
        self._match = lru_cache(maxsize=64)(partial(_make_matcher, self.special_tokens))
        self.find_none = self._find(frozenset())
        self.find_all = self._find(frozenset(self.special_tokens))
        self.refuse_none = native().SpecialTokens([])
        self.refuse_all = self._match(frozenset(self.special_tokens))

    def resolve(self, allowed: AllowedSpecial, disallowed: DisallowedSpecial) -> tuple[Any, Any]:
        """(finder of tokens to encode, matcher of strings to refuse)."""
        if disallowed == "all":
            if not allowed:
                return self.find_none, self.refuse_all
            if allowed == "all":
                return self.find_all, self.refuse_none
            disallowed = self.special_tokens.keys() - allowed
        elif isinstance(disallowed, str):
            raise TypeError(f'disallowed_special must be "all" or a collection of str, not {disallowed!r}')
        if allowed == "all":
            finder = self.find_all
        elif isinstance(allowed, str):
            raise TypeError(f'allowed_special must be "all" or a set of str, not {allowed!r}')
        else:
            finder = self._find(frozenset(self.special_tokens.keys() & allowed))
        return finder, self._match(frozenset(disallowed))

    def splitter(self, allowed: AllowedSpecial) -> Splitter:
        """Finds the same tokens as `resolve` says, and keeps their places."""
        return Splitter(
            [t for t in self._added_tokens if not t.special or allowed == "all" or t.content in allowed],
            self._settings.normalizer,
        )

    def _make_finder(self, allowed: frozenset[str]) -> Any:
        tokens = [token for token in self._added_tokens if not token.special or token.content in allowed]
        if self.is_plain:
            return native().SpecialTokens([(token.content, token.id) for token in tokens])
        return Splitter(tokens, self._settings.normalizer)


def _make_matcher(ids: dict[str, int], tokens: frozenset[str]) -> Any:
    """A disallowed string need not be a token, so it may have no id."""
    return native().SpecialTokens([(token, ids.get(token, 0)) for token in tokens])
