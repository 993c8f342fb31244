"""Ids against tiktoken and Hugging Face's tokenizers."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import TokenizerError
from fastlm.tokenizer import BpeTrainer, Tokenizer
from fastlm.tokenizer.byte_level import to_chars
from fastlm.tokenizer.patterns import PATTERN_NAMES, REGEXES
from tests.tokenizer.hugging_face import pre_tokenizer, random_text
from tests.tokenizer.test_pretokenize import ALPHABET, adversarial_text

SINGLE_BYTES = {bytes([i]): i for i in range(256)}
SPECIALS = {"<|endoftext|>": 5000, "<|x|>": 5001}


@pytest.fixture(scope="module")
def small_pairs(small_ranks: dict[bytes, int]) -> dict[str, tuple[Tokenizer, tiktoken.Encoding]]:
    """(ours, tiktoken's) with one small vocabulary under each pattern."""
    return {
        name: (
            Tokenizer(small_ranks, pattern=name, special_tokens=SPECIALS),
            tiktoken.Encoding(name, pat_str=REGEXES[name], mergeable_ranks=small_ranks, special_tokens=SPECIALS),
        )
        for name in PATTERN_NAMES
    }


def random_ranks(rng: random.Random) -> dict[bytes, int]:
    """Tokens over a few letters with ids in any order: some that merging never makes, some made before their parts."""
    letters = rng.choice(["ab", "abc", "가나"])
    tokens = {"".join(rng.choices(letters, k=rng.randrange(2, 9))).encode() for _ in range(rng.randrange(1, 60))}
    tokens |= {token[: rng.randrange(1, len(token) + 1)] for token in tokens}
    tokens -= SINGLE_BYTES.keys()
    ids = rng.sample(range(256, 1000), len(tokens))
    return SINGLE_BYTES | dict(zip(sorted(tokens), ids, strict=True))


@pytest.mark.parametrize("pattern", PATTERN_NAMES)
def test_ids_equal_tiktoken_under_every_pattern(
    pattern: str,
    small_pairs: dict[str, tuple[Tokenizer, tiktoken.Encoding]],
    real_texts: dict[str, str],
    newer_characters: set[str],
    fresh_seed: int,
) -> None:
    ours, theirs = small_pairs[pattern]
    for kind, text in real_texts.items():
        assert ours.encode(text) == theirs.encode(text), kind
    rng = random.Random(fresh_seed)
    for _ in range(3000):
        text = random_text(rng, rng.choice([1, 5, 30, 100]))
        assert ours.encode(text) == theirs.encode(text), repr(text)


def test_ids_equal_tiktoken_for_published_encodings_on_real_text(
    published: tuple[Tokenizer, tiktoken.Encoding], real_texts: dict[str, str], shared_data: Path | None
) -> None:
    ours, theirs = published
    texts = dict(real_texts)
    if shared_data:
        texts["plays"] = (shared_data / "tinyshakespeare.txt").read_text()[:300_000]
        texts["reviews"] = (shared_data / "nsmc" / "reviews.txt").read_text()[:200_000]
        texts["two languages"] = (shared_data / "ko-en" / "valid.tsv").read_text()
    for kind, text in texts.items():
        assert ours.encode(text) == theirs.encode(text), kind
        assert ours.decode(ours.encode(text)) == text, kind


def compare_on_random_text(ours: Tokenizer, theirs: tiktoken.Encoding, rng: random.Random, count: int) -> None:
    for _ in range(count):
        length = rng.choice([1, 2, 3, 8, 20, 60])
        kind = rng.random()
        if kind < 0.4:
            text = "".join(rng.choices(ALPHABET, k=length))
        elif kind < 0.8:
            text = random_text(rng, length)
        else:
            text = "".join(
                chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(length)
            )
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode_ordinary(text), repr(text)
        assert ours.decode_bytes(ids) == text.encode(), repr(text)


def test_ids_equal_tiktoken_for_published_encodings_on_random_text(
    published: tuple[Tokenizer, tiktoken.Encoding], fresh_seed: int
) -> None:
    compare_on_random_text(*published, random.Random(fresh_seed), 8000)


@pytest.mark.slow
def test_ids_equal_tiktoken_on_a_quarter_million_random_texts(
    published: tuple[Tokenizer, tiktoken.Encoding], fresh_seed: int
) -> None:
    compare_on_random_text(*published, random.Random(fresh_seed), 250_000)


@settings(deadline=None, max_examples=300)
@given(text=st.one_of(adversarial_text, st.text()))
def test_ids_equal_tiktoken_on_any_text(published: tuple[Tokenizer, tiktoken.Encoding], text: str) -> None:
    ours, theirs = published
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_ids_equal_tiktoken_for_ranks_in_any_order(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(150):
        ranks = random_ranks(rng)
        ours = Tokenizer(ranks, pattern="cl100k")
        theirs = tiktoken.Encoding("any", pat_str=REGEXES["cl100k"], mergeable_ranks=ranks, special_tokens={})
        for length in (1, 2, 7, 20, 60, 127, 128, 129, 400):
            text = "".join(rng.choices("abc가나 ", [8, 8, 4, 2, 2, 0.2], k=length))
            assert ours.encode(text) == theirs.encode(text), (ranks, text)


def runs(rng: random.Random, alphabet: str) -> str:
    """Rulers and the like: a few runs of one character."""
    return "".join(rng.choice(alphabet) * rng.choice([1, 2, 3, 31, 64, 100, 1000]) for _ in range(rng.randrange(1, 6)))


@pytest.mark.parametrize("alphabet", ["ab", "aab", "abc", "가각", "a\u0301b"])
def test_ids_equal_tiktoken_for_trained_vocabularies_of_few_characters(alphabet: str, fresh_seed: int) -> None:
    # Tokens overlap in every way, so that the longest one is often not the right one.
    rng = random.Random(fresh_seed)
    for _ in range(8):
        texts = ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(30)]
        trained = BpeTrainer(256 + rng.randrange(1, 200), pattern="gpt2", special_tokens=[]).train_from_iterator(texts)
        ours = Tokenizer(trained.mergeable_ranks, pattern="gpt2")
        theirs = tiktoken.Encoding(
            "trained", pat_str=REGEXES["gpt2"], mergeable_ranks=trained.mergeable_ranks, special_tokens={}
        )
        for length in (1, 2, 3, 5, 8, 13, 21, 34, 63, 64, 65, 300, 3000):
            text = "".join(rng.choices(alphabet, k=length))
            assert ours.encode(text) == theirs.encode(text), (trained.merges, text)
            assert trained.encode(text) == theirs.encode(text), (trained.merges, text)
        for _ in range(40):
            text = runs(rng, alphabet)
            assert ours.encode(text) == theirs.encode(text), (trained.merges, text)


def test_ids_equal_hugging_face_for_merges_in_any_order(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(150):
        ranks = random_ranks(rng)
        tokens = sorted(ranks)
        pairs = [(a, b) for a in tokens for b in tokens if a + b in ranks]
        merges = rng.sample(pairs, rng.randrange(len(pairs) + 1))
        # Ids have nothing to do with priority, and tokens that no merge makes must not be found whole.
        ours = Tokenizer(ranks, pattern="llama3", merges=merges)
        vocab = {to_chars(token): i for token, i in ranks.items()}
        theirs = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab, [(to_chars(a), to_chars(b)) for a, b in merges], ignore_merges=False)
        )
        theirs.pre_tokenizer = pre_tokenizer("llama3")
        for length in (1, 2, 7, 20, 60, 127, 128, 129, 400):
            text = "".join(rng.choices("abc가나 ", [8, 8, 4, 2, 2, 0.2], k=length))
            assert ours.encode(text) == theirs.encode(text).ids, (ranks, merges, text)


@pytest.mark.parametrize("alphabet", ["a", "ab", "etaoinshr", "의이가 ", "=-", "=-*#", " \t", "\n", "1"])
def test_long_pieces_equal_tiktoken(
    alphabet: str, published: tuple[Tokenizer, tiktoken.Encoding], fresh_seed: int
) -> None:
    ours, theirs = published
    rng = random.Random(fresh_seed)
    for length in (127, 128, 129, 257, 1000, 20_000):
        text = "".join(rng.choices(alphabet, k=length))
        assert ours.encode(text) == theirs.encode(text), text
    for _ in range(20):
        text = runs(rng, alphabet)
        assert ours.encode(text) == theirs.encode(text), text


def test_megabytes_of_one_letter_encode(small_ranks: dict[bytes, int]) -> None:
    # Merging that is quadratic in the length of a piece would take days.
    ours = Tokenizer(SINGLE_BYTES | {b"aa": 256, b"aaaa": 257}, pattern="cl100k")
    ids = ours.encode_to_numpy("a" * 4_000_003)
    assert len(ids) == 1_000_002
    assert set(ids[:-2].tolist()) == {257}
    assert ids[-2:].tolist() == [256, ord("a")]


@pytest.mark.slow
def test_a_line_of_a_gigabyte_encodes(small_ranks: dict[bytes, int]) -> None:
    ours = Tokenizer(SINGLE_BYTES | {b"aa": 256, b"aaaa": 257}, pattern="cl100k")
    ids = ours.encode_to_numpy("a" * 1_000_000_003)
    assert ids.size == 250_000_002
    assert (ids[:-2] == 257).all()
    assert ids[-2:].tolist() == [256, ord("a")]
    del ids
    ours = Tokenizer(small_ranks, pattern="gpt2")
    unit = " 나는 학교에 갔다."
    count = 1_000_000_000 // len(unit.encode())
    ids = ours.encode_to_numpy(unit * count)
    assert (ids.reshape(count, -1) == ours.encode_ordinary(unit)).all()


def test_nul_bytes_equal_tiktoken(published: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, theirs = published
    for text in ("\0", "a\0b", "한\0국어 \0\0", "\0" * 5000, " \0\n\0"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode_to_numpy(text).tolist() == ids
        assert ours.decode(ids) == text


def test_same_text_gives_the_same_ids_whatever_came_before(small_ranks: dict[bytes, int], fresh_seed: int) -> None:
    # The cache of pre-tokens must tell apart pieces that share a slot, a length or their ends.
    rng = random.Random(fresh_seed)
    ours = Tokenizer(small_ranks, pattern="gpt2")
    for _ in range(20_000):
        word = "".join(rng.choices("ab", k=rng.choice([3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33])))
        assert ours.encode(word) == ours._native.encode_piece(word.encode()), word


def test_more_words_than_the_cache_holds_equal_tiktoken(
    small_pairs: dict[str, tuple[Tokenizer, tiktoken.Encoding]], fresh_seed: int
) -> None:
    # Of one id to as many as bytes, so that lines of the cache are shared, taken whole, left, and taken from others.
    ours, theirs = small_pairs["gpt2"]
    rng = random.Random(fresh_seed)
    words = ["".join(rng.choices("aeinrst가힣", k=rng.randrange(1, 16))) for _ in range(300_000)]
    for number in (5_000, 40_000, len(words)):
        text = " ".join(rng.choices(words[:number], k=2 * number))
        assert ours.encode(text) == theirs.encode(text), number


def test_batch_and_numpy_equal_encode(
    small_ranks: dict[bytes, int], real_texts: dict[str, str], fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    ours = Tokenizer(small_ranks, pattern="o200k", special_tokens=SPECIALS)
    texts = [*real_texts.values(), *(random_text(rng, 200) for _ in range(200)), "a\ud83d\ude00\ud800b", "<|x|>y"]
    expected = [ours.encode(text, allowed_special="all") for text in texts]
    for num_threads in (None, 1, 2, 5):
        assert ours.encode_batch(texts, num_threads=num_threads, allowed_special="all") == expected
    assert ours.encode_batch([]) == []
    for text, ids in zip(texts, expected, strict=True):
        array = ours.encode_to_numpy(text, allowed_special="all")
        assert array.dtype == np.uint32
        assert array.tolist() == ids
    with pytest.raises(TokenizerError, match="num_threads is 0"):
        ours.encode_batch(["a"], num_threads=0)
    with pytest.raises(TypeError, match="not one str"):
        ours.encode_batch("abc")
    with pytest.raises(TypeError, match="must be a str, not bytes"):
        ours.encode_batch([b"abc"])


def test_offsets_equal_tiktoken(
    small_pairs: dict[str, tuple[Tokenizer, tiktoken.Encoding]], real_texts: dict[str, str], fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    ours, theirs = small_pairs["cl100k"]
    for text in [*real_texts.values(), *(random_text(rng, 50) for _ in range(300))]:
        text += "<|x|>é"
        ids, offsets = ours.encode_with_offsets(text, allowed_special="all")
        assert ids == theirs.encode(text, allowed_special="all")
        assert (text, offsets) == theirs.decode_with_offsets(ids)


def test_lone_surrogates_are_treated_as_tiktoken_treats_them(
    small_pairs: dict[str, tuple[Tokenizer, tiktoken.Encoding]],
) -> None:
    ours, theirs = small_pairs["cl100k"]
    for text in ("\ud83d\ude00", "a\ud800", "\udc00\ud800 b", "\ud800" * 3 + "가"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode_to_numpy(text).tolist() == theirs.encode(text)


def test_bytes_that_are_not_utf8_equal_tiktoken(
    published: tuple[Tokenizer, tiktoken.Encoding], fresh_seed: int
) -> None:
    ours, theirs = published
    rng = random.Random(fresh_seed)
    for _ in range(2000):
        text = random_text(rng, rng.choice([0, 1, 5, 40])).encode()
        cut = rng.randrange(len(text) + 1)
        data = text[:cut] + rng.randbytes(rng.choice([0, 1, 4])) + text[cut + rng.choice([0, 1]) :]
        ids = ours.encode_bytes(data)
        assert ids == theirs._encode_bytes(data), data
        assert ours.decode_bytes(ids) == data


def test_other_regular_expressions_fall_back_to_the_regex_package(
    small_ranks: dict[bytes, int], real_texts: dict[str, str], fresh_seed: int
) -> None:
    pattern = r"\p{Han}+|\p{L}+|\p{N}{1,2}|\s+|[^\s\p{L}\p{N}]+"
    ours = Tokenizer(small_ranks, pattern=pattern, special_tokens=SPECIALS)
    theirs = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=small_ranks, special_tokens=SPECIALS)
    for text in [*real_texts.values(), "x<|x|>y", "\ud800"]:
        expected = theirs.encode(text, allowed_special="all")
        assert ours.encode(text, allowed_special="all") == expected
        assert ours.encode_batch([text], allowed_special="all") == [expected]
        assert ours.encode_to_numpy(text, allowed_special="all").tolist() == expected
    with pytest.raises(TokenizerError, match=r"<\|x\|>"):
        ours.encode("a <|x|>")


def test_text_between_matches_of_a_regular_expression_is_kept(small_ranks: dict[bytes, int]) -> None:
    ours = Tokenizer(small_ranks, pattern=r"\p{L}+")
    assert ours.decode(ours.encode("one, 2 three!")) == "one, 2 three!"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mergeable_ranks": {}}, "empty"),
        ({"mergeable_ranks": {b"a": 0}}, "byte 0 has no token"),
        ({"mergeable_ranks": SINGLE_BYTES | {b"ab": 97}}, "two tokens have the id 97"),
        ({"mergeable_ranks": SINGLE_BYTES | {b"": 300}}, "token 300 is empty"),
        ({"mergeable_ranks": SINGLE_BYTES | {b"ab": 1 << 40}}, "has the id 1099511627776, which is not in 0"),
        ({"mergeable_ranks": SINGLE_BYTES | {b"ab": -1}}, "has the id -1, which is not in 0"),
        ({"mergeable_ranks": SINGLE_BYTES | {b"ab": 1 << 25}}, "which is not in 0 … 16777215"),
        ({"mergeable_ranks": SINGLE_BYTES | {b"a" * 9000: 300}}, "longer than 8192 bytes"),
        ({"merges": [(b"a", b"b")]}, "makes something that is no token"),
        ({"merges": [(b"a", b"bc")]}, "which is no token"),
        ({"mergeable_ranks": SINGLE_BYTES | {b"ab": 256}, "merges": [(b"a", b"b")] * 2}, "twice"),
        ({"special_tokens": {"x": 97}}, "'x' has the id 97 of an ordinary token"),
        ({"special_tokens": {"": 300}}, "special token is empty"),
        ({"special_tokens": {"x": 1 << 30}}, "'x' has the id 1073741824"),
        ({"special_tokens": {"x": 1 << 40}}, "'x' has the id 1099511627776"),
        ({"special_tokens": {"\ud800": 300}}, "surrogates"),
        ({"pattern": "(unclosed"}, "neither a name"),
    ],
)
def test_impossible_vocabularies_are_refused(changes: dict, message: str) -> None:
    arguments = {"mergeable_ranks": SINGLE_BYTES, "pattern": "gpt2"} | changes
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(arguments.pop("mergeable_ranks"), **arguments)


def test_fingerprint_changes_with_everything_that_changes_ids() -> None:
    ranks = SINGLE_BYTES | {b"ab": 256, b"bc": 257}
    base = Tokenizer(ranks, pattern="gpt2", special_tokens={"<|x|>": 300})
    others = [
        Tokenizer(ranks, pattern="cl100k", special_tokens={"<|x|>": 300}),
        Tokenizer(ranks, pattern="gpt2", special_tokens={"<|x|>": 301}),
        Tokenizer(ranks, pattern="gpt2"),
        Tokenizer(ranks, pattern="gpt2", special_tokens={"<|x|>": 300}, merges=[(b"a", b"b"), (b"b", b"c")]),
        Tokenizer(ranks, pattern="gpt2", special_tokens={"<|x|>": 300}, merges=[(b"b", b"c"), (b"a", b"b")]),
        Tokenizer(SINGLE_BYTES | {b"ab": 257, b"bc": 256}, pattern="gpt2", special_tokens={"<|x|>": 300}),
    ]
    assert len({t.fingerprint() for t in [base, *others]}) == 7
    again = Tokenizer(dict(reversed(ranks.items())), pattern="gpt2", special_tokens={"<|x|>": 300}, name="other")
    assert again.fingerprint() == base.fingerprint()


def test_vocabulary_is_described(small_ranks: dict[bytes, int]) -> None:
    ours = Tokenizer(small_ranks, pattern="gpt2", special_tokens={"<|end_of_text|>": 4000, "<|x|>": 3500})
    assert ours.vocab_size == 4001
    assert ours.eos_token_id == 4000
    assert ours.mergeable_ranks == small_ranks
    assert ours.merges is None
    assert Tokenizer(small_ranks, pattern="gpt2").eos_token_id is None


def test_tiktoken_files_and_names(
    tmp_path: Path, tiktoken_cache: Path, small_ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64

    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in small_ranks.items()]
    path = tmp_path / "own.tiktoken"
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert Tokenizer.from_tiktoken(path, pattern="gpt2").mergeable_ranks == small_ranks
    with pytest.raises(TokenizerError, match="pass pattern="):
        Tokenizer.from_tiktoken(path)
    with pytest.raises(TokenizerError, match="neither a file nor the name of an encoding; names are gpt2"):
        Tokenizer.from_tiktoken("cl200k")
    for bad in (b"", b"YQ== x", b"YQ", b"@@@ 1", b"YQ== 1\nYQ== 2", b"YQ== 1\nYg== 1", b"YQ== -1", b"\xff\xfe 1"):
        path.write_bytes(bad)
        with pytest.raises(TokenizerError, match=r"own\.tiktoken"):
            Tokenizer.from_tiktoken(path, pattern="gpt2")

    path.write_bytes(b"\n".join(line for line in lines if not line.startswith(b"QQ== ")))
    with pytest.raises(TokenizerError, match=r"own\.tiktoken: .*byte 65 has no token"):
        Tokenizer.from_tiktoken(path, pattern="gpt2")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(TokenizerError, match=f"there is no {tmp_path}.*download=True"):
        Tokenizer.from_tiktoken("cl100k_base")
    (tmp_path / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").write_bytes(b"YQ== 1")
    with pytest.raises(TokenizerError, match="SHA-256 is"):
        Tokenizer.from_tiktoken("cl100k_base")


def test_published_special_tokens_equal_tiktoken(tiktoken_cache: Path) -> None:
    for name in ("cl100k_base", "o200k_base", "o200k_harmony"):
        ours, theirs = Tokenizer.from_tiktoken(name), tiktoken.get_encoding(name)
        assert ours.special_tokens == theirs._special_tokens
        assert ours.vocab_size == theirs.n_vocab
        assert ours.eos_token_id == theirs.eot_token


def test_package_imports_without_the_native_core() -> None:
    script = (
        "import sys; sys.modules['fastlm._native'] = None\n"
        "import fastlm.tokenizer; from fastlm.tokenizer import Tokenizer, BpeTrainer, words\n"
        "from fastlm.errors import NativeCoreError\n"
        "try: Tokenizer({b'a': 0}, pattern='gpt2')\n"
        "except NativeCoreError: print('refused')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("refused\n", 0), result.stderr
