from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastlm.inference.text import TextStream


@given(st.lists(st.binary(max_size=5)))
def test_any_bytes_in_any_pieces_give_text_without_replacement_characters(pieces: list[bytes]) -> None:
    stream = TextStream()
    text = "".join(stream.push(piece) for piece in pieces) + stream.finish()
    assert text == b"".join(pieces).decode(errors="ignore")


@given(st.text(alphabet="abㄱ가", max_size=30), st.text(alphabet="abㄱ가", min_size=1, max_size=4), st.data())
def test_text_ends_before_the_first_stop_string_however_it_is_cut(text: str, stop: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    stream = TextStream((stop,))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    shown = "".join(stream.push(piece) for piece in pieces) + stream.finish()
    assert stream.stopped == (stop in text)
    assert shown == (text[: text.index(stop)] if stop in text else text)
