"""Added tokens, normalizers and splits of tokenizer.json, byte-level: against Hugging Face's tokenizers."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from fastlm.errors import TokenizerError
from fastlm.tokenizer import Tokenizer
from fastlm.tokenizer.normalizers import Normalizer
from fastlm.tokenizer.patterns import SEQUENCES, RegexSplitter
from fastlm.tokenizer.portable_regex import to_regex
from tests.tokenizer import hugging_face as hf
from tests.tokenizer.conftest import KOREAN

CORPUS = [KOREAN, "low lower lowest newest Strasse STRASSE", "e\u0301té été ﬁn Ⅳ"] * 3
FORMS = ("NFC", "NFD", "NFKC", "NFKD")
NORMALIZERS = {
    **{form: getattr(normalizers, form)() for form in FORMS},
    "lower": normalizers.Lowercase(),
    "strip": normalizers.Strip(),
    "strip left": normalizers.Strip(left=True, right=False),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "prepend": normalizers.Prepend("▁"),
    "replace": normalizers.Replace("lo", "LOW"),
    "replace regex": normalizers.Replace(Regex(r"\s+"), " "),
    "remove": normalizers.Replace("e", ""),
    "all": normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Prepend("x")]
    ),
}
PIECES = [
    *(
        "low",
        "LOW",
        "er",
        " ",
        "  ",
        "\t",
        "\n",
        "\u3000",
        "가",
        "각",
        "\u1100",
        "\u1161",
        "\u11a8",
        "e",
        "e\u0301",
        "é",
    ),
    *(
        "\u0323",
        "ﬁ",
        "Ⅳ",
        "İ",
        "Σ",
        "ς",
        "ß",
        "1",
        ".",
        "_",
        "<a>",
        "<A>",
        "<b>",
        "<c>",
        "word",
        "<m",
        "<mask>",
        "\u0301",
        "②",
    ),
]


def text_of(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(12)))


def load(tmp_path: Path, theirs: tokenizers.Tokenizer) -> Tokenizer:
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_huggingface(tmp_path / "tokenizer.json")
    ours.save(tmp_path / "again.json")
    return ours


def compare(tmp_path: Path, theirs: tokenizers.Tokenizer, rng: random.Random, count: int = 300) -> None:
    ours = load(tmp_path, theirs)
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "again.json"))
    for _ in range(count):
        text = text_of(rng)
        expected = theirs.encode(text).ids
        assert ours.encode(text, allowed_special="all") == expected, (text, theirs.encode(text).tokens)
        assert again.encode(text).ids == expected, text
        assert ours.encode_batch([text, text], allowed_special="all") == [expected] * 2
        assert ours.encode_to_numpy(text, allowed_special="all").tolist() == expected
        ids, offsets = ours.encode_with_offsets(text, allowed_special="all")
        assert ids == expected
        assert offsets == sorted(offsets)
        assert all(0 <= offset <= len(text) for offset in offsets)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizers_equal_hugging_face(name: str, tmp_path: Path, fresh_seed: int) -> None:
    theirs = hf.train(CORPUS, "gpt2", 400, ["<a>"])
    theirs.normalizer = NORMALIZERS[name]
    compare(tmp_path, theirs, random.Random(fresh_seed))


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalized_text_and_its_alignment(name: str, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    ours = Normalizer(json.loads(NORMALIZERS[name].__getstate__()))
    for _ in range(1500):
        text = text_of(rng) if rng.random() < 0.5 else hf.random_text(rng, rng.randrange(30))
        # Hugging Face's tables are of an older Unicode: combining marks added since are none there.
        text = "".join(char for char in text if unicodedata.ucd_3_2_0.category(char) != "Cn")
        expected = NORMALIZERS[name].normalize_str(text)
        assert ours(text) == expected, repr(text)
        aligned, origins = ours.align(text)
        assert aligned == expected, repr(text)
        assert len(origins) == len(aligned)
        assert origins == sorted(origins)
        for made, origin in zip(aligned, origins, strict=True):
            # A character that normalizing leaves as it is comes from itself or from what begins before it.
            assert origin <= len(text)
            if name in FORMS and ours(text) == text:
                assert text[origin] == made


def test_offsets_point_at_what_normalizing_changed(tmp_path: Path) -> None:
    theirs = hf.train(CORPUS, "gpt2", 300, [])
    theirs.normalizer = normalizers.NFC()
    ours = load(tmp_path, theirs)
    text = "ab e\u0301 가"
    ids, offsets = ours.encode_with_offsets(text)
    assert ours.decode(ids) == unicodedata.normalize("NFC", text)
    starts = {offset: ours.token_bytes(i) for i, offset in reversed(list(zip(ids, offsets, strict=True)))}
    assert "é".encode()[:1] in starts[3] or starts[2].startswith(" é".encode()[:2])
    assert offsets[-1] == 6


@pytest.mark.parametrize("option", ["plain", "single_word", "lstrip", "rstrip", "normalized", "any"])
@pytest.mark.parametrize("normalizer", [None, "lower", "NFC", "strip"])
def test_added_tokens_with_options_equal_hugging_face(
    option: str, normalizer: str | None, tmp_path: Path, fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(6):
        theirs = hf.train(CORPUS, "gpt2", 300, ["<a>"])
        if normalizer:
            theirs.normalizer = NORMALIZERS[normalizer]
        for content in ("<b>", "<c>", "word", "<A>", "<mask>", "<m", "low", "  "):
            options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            if option != "plain":
                options |= {key: rng.random() < 0.5 for key in options if option in (key, "any")}
            # There, tokens of white space that strip white space overlap, and one that normalizes to nothing panics.
            if content == "  ":
                options |= {"lstrip": False, "rstrip": False, "normalized": False}
            add = theirs.add_special_tokens if rng.random() < 0.5 else theirs.add_tokens
            add([AddedToken(content, **options)])
        compare(tmp_path, theirs, rng, 150)


SPLITS: dict[str, list[Any]] = {
    "digits": [pre_tokenizers.Digits(individual_digits=True)],
    "digit runs": [pre_tokenizers.Digits(individual_digits=False)],
    "punctuation": [pre_tokenizers.Punctuation("isolated")],
    "punctuation runs": [pre_tokenizers.Punctuation("contiguous")],
    "string": [pre_tokenizers.Split("low", "isolated")],
    "lines": [pre_tokenizers.Split(Regex("[\r\n]"), "isolated"), pre_tokenizers.Split(Regex(r"\s+$"), "isolated")],
    **{
        name: [pre_tokenizers.Split(Regex(step.replace(r"(?=\n|\Z)", "$")), "isolated") for step in steps]
        for name, steps in SEQUENCES.items()
        if name != "starcoder"
    },
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("use_regex", [True, False])
def test_splits_in_turn_equal_hugging_face(name: str, use_regex: bool, tmp_path: Path, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    theirs = hf.train(CORPUS, "gpt2", 400, ["<a>"])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([*SPLITS[name], byte_level])
    compare(tmp_path, theirs, rng, 100)
    ours = load(tmp_path, theirs)
    for _ in range(400):
        text = hf.random_text(rng, rng.randrange(60))
        assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids, repr(text)


PORTABLE = [
    *(
        r"\p{Han}+",
        r" ?[^\s\p{L}]+[\r\n/]*",
        r"\s+(?!\S)|\s+",
        r"(?i:'s|'t|'ll)|\p{L}+",
        r"\p{N}{1,3}",
        r"a|b$",
        r"\s++",
    ),
    *(
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",
        r"(?:\p{L}\p{M}*)+",
        r"'(?i:[sdmt]|ll)|.",
        "\\d{2,}|가-힣",
        r"[가-힣ㄱ-ㆎ]+",
        r"(a)(?=b)",
    ),
]


@pytest.mark.parametrize("pattern", PORTABLE)
def test_portable_patterns_mean_the_same_to_both_engines(pattern: str, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    ours = RegexSplitter(to_regex(pattern))
    theirs = pre_tokenizers.Split(Regex(pattern), "isolated")
    for _ in range(1500):
        text = hf.random_text(rng, rng.randrange(40)) + rng.choice(["", "\n", "ab", "b\n", "'ſ", "'LL"])
        assert ours.split(text) == [piece for piece, _ in theirs.pre_tokenize_str(text) if piece], repr(text)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            r"\w+",
            r"\bx",
            r"\p{N}{1,3}+",
            r"\p{^L}",
            r"[[:alpha:]]",
            r"[a&&b]",
            r"(?i:ss)",
            r"(?i:é)",
            r"a{2}?",
            r"(?m:.)",
        ),
        *(r"\z", r"\h", r"\R", r"(?i)a", r"^a", r"*a", r"(", "[b-a]", r"a**", r"\x{41}", "a{,3}"),
    ],
)
def test_patterns_that_engines_read_differently_are_refused(pattern: str) -> None:
    with pytest.raises(TokenizerError, match=r"is not supported|no regular expression"):
        to_regex(pattern)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=r"\pPLN{}[]()?*+|^$sSwdzb,123-&:!=<> a'", max_size=12))
def test_any_string_as_a_pattern_is_translated_or_refused(pattern: str) -> None:
    try:
        translated = to_regex(pattern)
    except TokenizerError:
        return
    regex.compile(translated)
