"""Guesses of the tokens that come next, for speculative decoding without a second model.

Text repeats itself, and its prompt: what followed the latest tokens where they last stood is likely to follow again
("prompt lookup decoding", Saxena 2023). The engine computes the guesses together with the next token and keeps those
that equal what is drawn at their places. A draw is keyed by (seed, position), so it is the same draw that would have
come without guesses (Leviathan et al., 2023, accept by a random test instead, which keeps the distribution alone).
"""

from __future__ import annotations

NGRAM_SIZES = (3, 2)  # tokens that must agree; the longer context is asked first


class PromptLookup:
    """The places that n-grams of one growing sequence were last followed from."""

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its last occurrence
        self._indexed = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` guesses of what follows `tokens`, which begins with the tokens of the call before."""
        for end in range(self._indexed + 1, len(tokens)):  # an n-gram that ends the sequence is followed by nothing yet
            for size in NGRAM_SIZES:
                if size <= end:
                    self._follows[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        for size in NGRAM_SIZES:
            start = self._follows.get(tuple(tokens[-size:]))
            if start is not None:
                return tokens[start : start + most] if most > 0 else []
        return []
