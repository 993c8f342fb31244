"""Which special tokens text may make: tiktoken's policy, checked against it."""

from __future__ import annotations

import random

import pytest
import tiktoken

from fastlm.errors import TokenizerError
from fastlm.tokenizer import Tokenizer
from fastlm.tokenizer.patterns import REGEXES

SPECIALS = {"<|endoftext|>": 5000, "<|fim|>": 5001, "<|end|>": 5002, "[X]": 5003, "끝": 5004}


@pytest.fixture(scope="module", params=["cl100k", "own regex"])
def pair(request: pytest.FixtureRequest, small_ranks: dict[bytes, int]) -> tuple[Tokenizer, tiktoken.Encoding]:
    pattern = "cl100k" if request.param == "cl100k" else r"\p{L}+|\P{L}+"
    return (
        Tokenizer(small_ranks, pattern=pattern, special_tokens=SPECIALS),
        tiktoken.Encoding(
            "own", pat_str=REGEXES.get(pattern, pattern), mergeable_ranks=small_ranks, special_tokens=SPECIALS
        ),
    )


def test_policy_equals_tiktoken(pair: tuple[Tokenizer, tiktoken.Encoding], fresh_seed: int) -> None:
    ours, theirs = pair
    rng = random.Random(fresh_seed)
    names = [*SPECIALS, "<|no|>"]
    refused = 0
    for _ in range(3000):
        parts = [*SPECIALS, *SPECIALS, "<|", "|>", "<|end", " ", "end", "가", "\n ", "[", "X]", "<|no|>", "  "]
        text = "".join(rng.choices(parts, k=rng.randrange(8)))
        allowed = rng.choice([set(), "all", set(rng.sample(names, rng.randrange(len(names))))])
        disallowed = rng.choice(["all", (), rng.sample(names, rng.randrange(len(names)))])
        policy = {"allowed_special": allowed, "disallowed_special": disallowed}
        try:
            expected = theirs.encode(text, **policy)
        except ValueError:
            refused += 1
            for call in (ours.encode, ours.encode_to_numpy, lambda t, **kw: ours.encode_batch([t], **kw)):
                with pytest.raises(TokenizerError):
                    call(text, **policy)
            continue
        assert ours.encode(text, **policy) == expected, (text, policy)
        assert ours.encode_to_numpy(text, **policy).tolist() == expected
        assert ours.encode_batch([text], **policy) == [expected]
        assert ours.decode(expected) == text
    assert 100 < refused < 2900


def test_refusal_names_the_token_and_both_ways_out(pair: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    with pytest.raises(TokenizerError) as refusal:
        pair[0].encode("a [X] <|fim|>")
    assert "'[X]'" in str(refusal.value)
    assert "allowed_special={'[X]'}" in str(refusal.value)
    assert "disallowed_special=()" in str(refusal.value)


def test_ordinary_encoding_spells_special_tokens(pair: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, theirs = pair
    text = "<|endoftext|>끝"
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
    assert not set(ours.encode_ordinary(text)) & set(SPECIALS.values())


def test_of_tokens_that_begin_alike_the_longest_counts(small_ranks: dict[bytes, int]) -> None:
    ours = Tokenizer(small_ranks, pattern="gpt2", special_tokens={"<s>": 4000, "<s>>": 4001, "<s": 4002})
    assert ours.encode("<s>>", allowed_special="all") == [4001]
    assert ours.encode("<s><s", allowed_special="all") == [4000, 4002]
    assert ours.encode("<s>>", allowed_special={"<s>"}, disallowed_special=())[0] == 4000


def test_two_special_tokens_may_share_an_id(small_ranks: dict[bytes, int]) -> None:
    ours = Tokenizer(small_ranks, pattern="gpt2", special_tokens={"<a>": 4000, "<b>": 4000})
    assert ours.encode("<a><b>", allowed_special="all") == [4000, 4000]
    assert ours.decode([4000]) == "<a>"


def test_a_string_is_no_set_of_tokens(pair: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    with pytest.raises(TypeError, match="allowed_special must be"):
        pair[0].encode("a", allowed_special="<|fim|>")
    with pytest.raises(TypeError, match="disallowed_special must be"):
        pair[0].encode("a", disallowed_special="<|fim|>")
