"""The native scanners against the published regular expressions in the `regex` package."""

from __future__ import annotations

import random

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm._core import native
from fastlm.tokenizer.patterns import PATTERN_NAMES, REGEXES, name_of_pattern
from tests.tokenizer.conftest import EMOJI, KOREAN, SPACES
from tests.tokenizer.hugging_face import random_text

COMPILED = {name: regex.compile(pattern) for name, pattern in REGEXES.items()}

# What the alternatives of the patterns look at, and what is near it.
ALPHABET = [
    *"aAbZ'’sStTmMdDrReEvVlLſKİıßÀéñǅǲʰªº  \t\n\r\x0b\x0c\x1c\x85\xa0\u3000\u2028\u200b/\\.,!?-_=(){}#123٣४²½Ⅷ〇",
    *["\r\n", "\n\n", "'s", "'S", "'ll", "'LL", "'lL", "'re", "'Ve", "'ſ", "\u0301", "\u0345", "\u0903", "क्", "한"],
    *["글", "ᄒ", "ᅡ", "ᆫ", "漢", "ー", "👩‍👩‍👧", "😀", "🏽", "ﬆ", "Ω", "ж", "א", "\0", "\ue000", "\U0010ffff", "\ufffd"],
]
adversarial_text = st.lists(st.sampled_from(ALPHABET), max_size=40).map("".join)


SCANNERS = ("avx512", "avx2", "portable", "scalar")


def pieces(pattern: str, text: str) -> list[str]:
    return [piece.decode() for piece in native().pretokenize(pattern, text.encode())]


@pytest.fixture(params=SCANNERS)
def scanner(request: pytest.FixtureRequest) -> str:
    try:
        native().pretokenize("gpt2", b"", request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def random_string(rng: random.Random) -> str:
    """Of few kinds of characters or many, on either side of a scanner's 64 bytes."""
    length = rng.choice([1, 2, 3, 5, 8, 13, 30, 63, 64, 65, 130])
    kind = rng.random()
    if kind < 0.3:
        return "".join(rng.choices(ALPHABET, k=length))
    if kind < 0.7:
        return "".join(rng.choices(rng.sample(ALPHABET, rng.randrange(1, 12)), k=length))
    return random_text(rng, length)


@pytest.mark.parametrize("pattern", PATTERN_NAMES)
def test_scanner_equals_the_regex_on_random_text(
    pattern: str, scanner: str, newer_characters: set[str], fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(3000):
        text = random_string(rng)
        if not newer_characters.intersection(text):
            found = [piece.decode() for piece in native().pretokenize(pattern, text.encode(), scanner)]
            assert found == COMPILED[pattern].findall(text), repr(text)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERN_NAMES)
def test_scanners_agree_on_a_quarter_million_random_bytes(pattern: str, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(250_000):
        data = bytearray(random_string(rng).encode())
        for _ in range(rng.choice([0, 0, 1, 5])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        expected = native().pretokenize(pattern, bytes(data), "scalar")
        assert native().pretokenize(pattern, bytes(data)) == expected, data
        assert native().pretokenize(pattern, bytes(data), "portable") == expected, data


@pytest.mark.parametrize("pattern", PATTERN_NAMES)
@settings(deadline=None, max_examples=300)
@given(text=adversarial_text)
def test_scanner_equals_the_regex_where_alternatives_meet(pattern: str, text: str) -> None:
    assert pieces(pattern, text) == COMPILED[pattern].findall(text)


@pytest.mark.parametrize("pattern", PATTERN_NAMES)
def test_code_points_are_split_as_the_regex_splits_them(
    pattern: str, newer_characters: set[str], fresh_seed: int
) -> None:
    # All of the first two planes and of the tags; of the rest, which is ideographs and unassigned, a sample.
    codes = [*range(0x20000), *range(fresh_seed % 16 + 0x20000, 0x110000, 16), *range(0xE0000, 0xE0200)]
    chars = [chr(c) for c in codes if not 0xD800 <= c < 0xE000 and chr(c) not in newer_characters]
    for start in range(0, len(chars), 4096):
        text = "".join(f"a{c}B {c}{c}1" for c in chars[start : start + 4096])
        assert pieces(pattern, text) == COMPILED[pattern].findall(text), hex(ord(chars[start]))


@pytest.mark.parametrize("pattern", PATTERN_NAMES)
@pytest.mark.parametrize("text", [KOREAN, EMOJI, SPACES], ids=["Korean", "emoji", "spaces"])
def test_scanner_equals_the_regex_on_real_text(pattern: str, text: str) -> None:
    assert pieces(pattern, text) == COMPILED[pattern].findall(text)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("gpt2", "it's IT'S  x", ["it", "'s", " IT", "'", "S", " ", " x"]),
        ("cl100k", "IT'S 'ſa 12345", ["IT", "'S", " '", "ſa", " ", "123", "45"]),
        ("cl100k", "a \n \n  ", ["a", " \n \n  "]),
        ("llama3", "a \n \n  ", ["a", " \n \n", "  "]),
        ("qwen2", "x12", ["x", "1", "2"]),
        ("o200k", "HTTPServer's\u0301'LL GO/\n", ["HTTPServer's", "\u0301'LL", " GO", "/\n"]),
        ("o200k", "\u0301ABC 가AB", ["\u0301", "ABC", " 가", "AB"]),
    ],
)
def test_known_splits(pattern: str, text: str, expected: list[str]) -> None:
    assert COMPILED[pattern].findall(text) == expected, "the expectation itself"
    assert pieces(pattern, text) == expected


@pytest.mark.parametrize("pattern", PATTERN_NAMES)
def test_malformed_utf8_is_covered_byte_by_byte(pattern: str, scanner: str, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    whole = [b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\xf0\x9f\x98", b"\x80", b"\xff", b"\xc3"]
    for _ in range(500):
        data = b"".join(
            rng.choice([rng.choice(whole), rng.randbytes(rng.randrange(4)), "가a 1".encode()]) for _ in range(8)
        )
        found = native().pretokenize(pattern, data, scanner)
        assert b"".join(found) == data
        assert all(found)
    for bad in whole:
        # Each bad byte is one character that is neither letter, number nor space.
        replaced = pieces(pattern, "a" + "\ufffd" * len(bad) + " b")
        found = native().pretokenize(pattern, b"a" + bad + b" b", scanner)
        assert [piece.replace(bad, b"?" * len(bad)) for piece in found] == [
            piece.replace("\ufffd", "?").encode() for piece in replaced
        ]


@pytest.mark.parametrize("pattern", PATTERN_NAMES)
@pytest.mark.parametrize("unit", ["a", "A", "aA", " ", " \n", "\u0301", "가A", "é", "!", "'", "1", "\u3000"])
def test_long_runs_are_split_as_short_ones(pattern: str, unit: str, scanner: str) -> None:
    # Quadratic scanning would take minutes.
    found = native().pretokenize(pattern, (unit * 200_000 + "x").encode(), scanner)
    long = [piece.decode() for piece in found]
    assert "".join(long) == unit * 200_000 + "x"
    short = pieces(pattern, unit * 300 + "x")
    assert short == COMPILED[pattern].findall(unit * 300 + "x")
    assert len(long) <= 700 * len(short)


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match="no pattern named 'gpt5'; there are gpt2, cl100k, o200k, llama3, qwen2"):
        native().pretokenize("gpt5", b"x")
    with pytest.raises(ValueError, match="no scanner named 'sve'"):
        native().pretokenize("gpt2", b"x", "sve")


def test_published_regexes_are_known_by_name() -> None:
    import tiktoken_ext.openai_public as published

    assert name_of_pattern(published.r50k_pat_str) == "gpt2"
    assert {name_of_pattern(pattern) for pattern in REGEXES.values()} == set(PATTERN_NAMES)
    assert name_of_pattern(r"\w+") == r"\w+"
