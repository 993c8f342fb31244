"""Pieces and their ids or scores, held in a few arrays: dicts of a quarter of a million strings would take 60 MB."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from math import isnan, nan

from fastlm._core import native
from fastlm.tokenizer.special_policy import MAX_ID


class PieceTable(Mapping[str, int]):
    """The id of each piece, in the order of ids.

    Raises:
        ValueError: a piece is empty, or two have the same id.
    """

    def __init__(self, pieces: Mapping[str, int]) -> None:
        self._native = native().PieceTable((piece.encode(), i) for piece, i in pieces.items())
        self._size = len(pieces)

    def piece(self, i: int) -> str | None:
        """The piece with the id `i`; None when there is none."""
        found: bytes | None = self._native.piece(i) if 0 <= i <= MAX_ID else None
        return None if found is None else found.decode()

    def __getitem__(self, piece: str) -> int:
        found: int | None = self._native.find(piece.encode("utf-8", "surrogatepass"))
        if found is None:
            raise KeyError(piece)
        return found

    def __iter__(self) -> Iterator[str]:
        for i in range(self._native.num_ids()):
            piece = self.piece(i)
            if piece is not None:
                yield piece

    def __len__(self) -> int:
        return self._size


class ScoreTable(Mapping[str, float]):
    """The scores of pieces, of which not all need have one. Those of what is no piece are left out."""

    def __init__(self, table: PieceTable, ids: Mapping[str, int], scores: Mapping[str, float]) -> None:
        self._pieces = table
        self._scores = array("d", [nan]) * (max(ids.values(), default=-1) + 1)
        for piece, score in scores.items():
            if piece in ids:
                self._scores[ids[piece]] = score

    def __getitem__(self, piece: str) -> float:
        score = self._scores[self._pieces[piece]]
        if isnan(score):
            raise KeyError(piece)
        return score

    def __iter__(self) -> Iterator[str]:
        return (piece for piece, i in self._pieces.items() if not isnan(self._scores[i]))

    def __len__(self) -> int:
        return sum(1 for _ in self)
