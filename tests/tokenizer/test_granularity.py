from __future__ import annotations

import builtins
import random
import unicodedata
from itertools import pairwise
from typing import Any

import pytest

from fastlm.errors import DataError, FastlmError
from fastlm.tokenizer import Tokenizer, granularity
from fastlm.tokenizer.granularity import (
    GRANULARITIES,
    OTHER_GRANULARITIES,
    characters,
    code_points,
    morphemes,
    paragraphs,
    sentences,
    split,
    words,
)

FAMILY = "👩‍👩‍👧"


def test_characters_are_what_readers_count() -> None:
    decomposed = unicodedata.normalize("NFD", "한é")
    assert characters(f"a{FAMILY}🇰🇷{decomposed}\r\n") == ["a", FAMILY, "🇰🇷", decomposed[:3], decomposed[3:], "\r\n"]
    assert len(code_points(FAMILY)) == 5


def test_characters_and_code_points_lose_nothing_of_random_unicode() -> None:
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(60))
        assert "".join(characters(text)) == "".join(code_points(text)) == text


def test_words_keep_contractions_and_numbers_and_separate_punctuation() -> None:
    assert words("Don't pay 3.14, 안녕하세요! a_b…") == ["Don't", "pay", "3.14", ",", "안녕하세요", "!", "a_b", "…"]


def test_words_lose_only_white_space() -> None:
    rng = random.Random(1)
    for _ in range(50):
        text = "".join(rng.choice("ab.,'’ 가\n\t9_-") for _ in range(80))
        assert "".join(words(text)) == "".join(text.split())


def test_korean_morphemes_separate_stem_particle_and_ending() -> None:
    found = morphemes("나는 학교에 갔다. Python을 배운다.")
    assert found[:6] == ["나", "는", "학교", "에", "가", "었"]
    assert "Python" in found


def test_morphemes_of_english_are_refused() -> None:
    with pytest.raises(DataError, match="Korean text only"):
        morphemes("She walked home.")


def test_english_sentences_end_where_a_reader_says() -> None:
    text = 'Dr. Kim said "Go." He went! J. S. Bach wrote it, e.g. the Mass. It cost 3.5 dollars. Why? Yes'
    assert sentences(text) == [
        'Dr. Kim said "Go."',
        "He went!",
        "J. S. Bach wrote it, e.g. the Mass.",
        "It cost 3.5 dollars.",
        "Why?",
        "Yes",
    ]


def test_korean_sentences_end_without_punctuation_too() -> None:
    assert sentences("나는 학교에 갔다. 너도 갔니?\n\nHello there. Bye.") == [
        "나는 학교에 갔다.",
        "너도 갔니?",
        "Hello there.",
        "Bye.",
    ]


def test_paragraphs_are_separated_by_blank_lines_of_any_line_end() -> None:
    assert paragraphs("a\n\nb\r\n\r\nc\n \n\n d\ne\n") == ["a", "b", "c", "d\ne"]


def test_empty_text_has_no_units() -> None:
    for function in (characters, code_points, words, sentences, paragraphs):
        assert function("") == [] == function("")


def test_missing_kiwipiepy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_kiwi(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("kiwipiepy"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_kiwi)
    granularity._kiwi.cache_clear()
    with pytest.raises(FastlmError, match=r'pip install "fastlm\[korean\]"'):
        morphemes("안녕")
    assert sentences("Only English. Still works.") == ["Only English.", "Still works."]


def test_many_abbreviations_and_long_runs_take_linear_time() -> None:
    assert len(sentences("Mr. " * 20_000)) == 1
    assert len(sentences("A b. " * 20_000)) == 20_000
    assert len(words("." * 200_000)) == 200_000
    assert len(paragraphs("\n \n" * 50_000)) == 0


MIXED = "나는 학교에 갔다.  Dr. Kim came. 너도?\r\n\r\n둘째 문단 👩‍👩‍👧 e\u0301!\n끝 "


@pytest.mark.parametrize("by", [*GRANULARITIES, *OTHER_GRANULARITIES])
def test_units_say_where_in_the_text_they_are(by: str) -> None:
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)} | {"나는".encode(): 256}, pattern="gpt2")
    units = split(MIXED, by, tokenizer)
    assert units
    assert [unit.begin for unit in units] == sorted(unit.begin for unit in units)
    for unit in units:
        assert 0 <= unit.begin < unit.end <= len(MIXED)
        if by not in ("morpheme", "subword"):
            assert MIXED[unit.begin : unit.end] == unit.text
    if by == "morpheme":
        assert [(u.text, MIXED[u.begin : u.end], u.tag) for u in units[:3]] == [
            ("나", "나", "NP"),
            ("는", "는", "JX"),
            ("학교", "학교", "NNG"),
        ]
    if by == "subword":
        assert [unit.id for unit in units] == tokenizer.encode(MIXED)
        assert [MIXED[u.begin : u.end] for u in units if u.id == 256] == ["나는"]


def test_units_of_random_text_are_parts_of_it() -> None:
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(
            rng.choices([*"ab. \n\r\t?!\"'", "\n\n", "Mr. ", " A", "\u3000", "漢", FAMILY], k=rng.randrange(30))
        )
        for by in ("character", "code-point", "word", "whitespace", "sentence", "paragraph"):
            units = split(text, by)
            assert all(text[unit.begin : unit.end] == unit.text for unit in units)
            assert all(a.end <= b.begin for a, b in pairwise(units))


def test_whitespace_words_keep_their_punctuation() -> None:
    assert [unit.text for unit in split("Don't stop, 갔다.\u3000끝", "whitespace")] == ["Don't", "stop,", "갔다.", "끝"]


def test_unknown_sizes_and_missing_tokenizers_are_refused() -> None:
    with pytest.raises(DataError, match="no units named 'syllable'; there are character, "):
        split("a", "syllable")
    with pytest.raises(DataError, match="pass one"):
        split("a", "subword")
