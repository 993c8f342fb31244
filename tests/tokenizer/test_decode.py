"""Ids back to text, whole and one by one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import TokenizerError
from fastlm.tokenizer import Tokenizer
from tests.tokenizer.hugging_face import random_text

SINGLE_BYTES = {bytes([i]): i for i in range(256)}


@pytest.fixture(scope="module")
def tokenizer(small_ranks: dict[bytes, int]) -> Tokenizer:
    return Tokenizer(small_ranks, pattern="cl100k", special_tokens={"<|endoftext|>": 5000})


@settings(deadline=None, max_examples=300)
@given(text=st.text())
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, allowed_special="all")
    assert tokenizer.decode(ids, errors="strict") == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode() == tokenizer.decode_bytes(ids)


def test_stream_never_gives_half_a_character(tokenizer: Tokenizer, real_texts: dict[str, str], fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    bytewise = Tokenizer(SINGLE_BYTES, pattern="gpt2")
    texts = [*(text[:5000] for text in real_texts.values()), *(random_text(rng, 60) for _ in range(300))]
    for text in texts:
        text = text.replace("\ufffd", "")
        for t in (tokenizer, bytewise):
            stream = t.decode_stream()
            parts = [stream.push(i) for i in t.encode(text, disallowed_special=())]
            assert "\ufffd" not in "".join(parts)
            assert "".join(parts) == text  # so nothing is held back longer than needed
            assert stream.finish() == ""


def test_stream_of_any_ids_equals_decode(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    t = Tokenizer(SINGLE_BYTES, pattern="gpt2")
    leads = [0x41, 0x80, 0xBF, 0xC0, 0xC3, 0xE2, 0xED, 0xA0, 0xF0, 0x9F, 0x98, 0xF4, 0x90, 0xFF]
    stream = t.decode_stream()
    for _ in range(2000):
        ids = rng.choices(leads, k=rng.randrange(12))
        assert "".join(map(stream.push, ids)) + stream.finish() == t.decode(ids), ids


def test_stream_goes_on_after_a_bad_id(tokenizer: Tokenizer) -> None:
    stream = tokenizer.decode_stream()
    first, *rest = "한".encode()
    assert stream.push(tokenizer.mergeable_ranks[bytes([first])]) == ""
    with pytest.raises(TokenizerError, match="id 4999 at position 0"):
        stream.push(4999)
    assert "".join(stream.push(tokenizer.mergeable_ranks[bytes([byte])]) for byte in rest) == "한"


def test_errors_says_what_becomes_of_bytes_that_are_not_utf8(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.mergeable_ranks[b"\xed"], tokenizer.mergeable_ranks[b"a"]]
    assert tokenizer.decode(ids) == "\ufffda"
    assert tokenizer.decode(ids, errors="ignore") == "a"
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(ids, errors="strict")


@pytest.mark.parametrize("bad", [-1, 3000, 4999, 5001, 1 << 31, 1 << 32, 1 << 70, -(1 << 70)])
def test_ids_outside_the_vocabulary_are_named(tokenizer: Tokenizer, bad: int) -> None:
    for call in (tokenizer.decode, tokenizer.decode_bytes, lambda ids: tokenizer.decode_batch([ids])):
        with pytest.raises(TokenizerError, match=f"id {bad} at position 2"):
            call([1, 2, bad])
    with pytest.raises(TokenizerError, match=f"id {bad} "):
        tokenizer.token_bytes(bad)


def test_ids_come_in_any_kind_of_sequence(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("any kind, 아무거나")
    for kind in (tuple, np.array, torch.tensor, iter, lambda x: np.array(x, dtype=np.uint32)):
        assert tokenizer.decode(kind(ids)) == "any kind, 아무거나"
    assert tokenizer.decode_batch([ids, []]) == ["any kind, 아무거나", ""]
    for wrong in (5, ["a"], [1.5], [None]):
        with pytest.raises(TypeError):
            tokenizer.decode(wrong)
