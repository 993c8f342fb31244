"""Tables of pieces behave as the dicts that they stand for."""

from __future__ import annotations

import pytest

from fastlm.tokenizer.piece_table import PieceTable, ScoreTable

PIECES = {"▁": 5, "가": 0, "ab": 3, "😀": 9}
SCORES = {"가": -1.5, "😀": 0.0, "no piece": 2.0}


def test_pieces_are_found_both_ways_and_come_in_the_order_of_ids() -> None:
    table = PieceTable(PIECES)
    assert dict(table) == PIECES
    assert list(table) == ["가", "ab", "▁", "😀"]
    assert len(table) == 4
    assert [table.piece(i) for i in range(-1, 11)] == [None, "가", None, None, "ab", None, "▁", *[None] * 3, "😀", None]


@pytest.mark.parametrize("missing", ["", "a", "abc", "\ud800", "a" * 10_000])
def test_what_is_no_piece_is_missing(missing: str) -> None:
    table = PieceTable(PIECES)
    assert missing not in table
    with pytest.raises(KeyError):
        table[missing]


@pytest.mark.parametrize("i", [-(2**70), -1, 10, 2**24, 2**32, 2**70])
def test_ids_outside_the_table_have_no_piece(i: int) -> None:
    assert PieceTable(PIECES).piece(i) is None


@pytest.mark.parametrize("pieces", [{"": 0}, {"a": 1, "b": 1}])
def test_pieces_that_cannot_be_told_apart_are_refused(pieces: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"empty|two tokens"):
        PieceTable(pieces)


def test_scores_are_those_of_pieces() -> None:
    table = ScoreTable(PieceTable(PIECES), PIECES, SCORES)
    assert dict(table) == {"가": -1.5, "😀": 0.0}
    assert len(table) == 2
    for missing in ("ab", "no piece", "\ud800"):
        assert table.get(missing) is None
