"""What the tokens lab computes: what texts cost in a vocabulary, and what cutting texts at some size loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastlm.labs.statistics import Interval, bootstrap
from fastlm.tokenizer import Tokenizer

Pairs = list[tuple[str, str]]  # Korean, English
Cut = Callable[[str], list[bytes]]


class Cost:
    """What the sentences of some pairs cost in a vocabulary; `korean` and `english` are tokens of each."""

    def __init__(self, tokenizer: Tokenizer, pairs: Pairs, seed: int) -> None:
        sides = [list(side) for side in zip(*pairs, strict=True)]
        self.korean, self.english = (
            np.array([len(ids) for ids in tokenizer.encode_batch(side, disallowed_special=())]) for side in sides
        )
        self.vocab_size = tokenizer.vocab_size
        self.price: Interval = bootstrap(range(len(pairs)), seed=seed, statistic=self._price)

    def _price(self, places: NDArray[np.float64]) -> float:
        """Tokens of the Korean sides over tokens of the English ones."""
        rows = places.astype(int)
        return float(self.korean[rows].sum() / self.english[rows].sum())


@dataclass(frozen=True)
class Loss:
    """Of texts that are cut into pieces of a vocabulary. Shares are from 0 to 1."""

    vocabulary: int
    pieces: float  # of a text, on average
    unknown: float  # share of pieces that the vocabulary lacks
    unreadable: float  # share of texts that hold one
    broken: float  # share of pieces that are part of a character
    restored: float  # share of texts that the pieces give back when joined, with or without spaces

    def row(self) -> list[int | float]:
        shares = (self.unknown, self.unreadable, self.broken, self.restored)
        return [self.vocabulary, self.pieces, *[100 * share for share in shares]]


def loss_of_cutting(cut: Cut, vocabulary: set[bytes], texts: Sequence[str]) -> Loss:
    cuts = [cut(text) for text in texts]
    unknown = [sum(piece not in vocabulary for piece in pieces) for pieces in cuts]
    restored = [text.encode() in (b"".join(cut), b" ".join(cut)) for text, cut in zip(texts, cuts, strict=True)]
    count = sum(map(len, cuts))
    return Loss(
        vocabulary=len(vocabulary),
        pieces=count / len(cuts),
        unknown=sum(unknown) / count,
        unreadable=sum(map(bool, unknown)) / len(cuts),
        broken=sum(not _is_text(piece) for pieces in cuts for piece in pieces) / count,
        restored=sum(restored) / len(cuts),
    )


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
