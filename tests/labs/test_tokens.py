"""The tokens lab: what it counts against outside facts, and what it claims at small size."""

from __future__ import annotations

import pytest
import tiktoken

from fastlm.labs import tokens
from fastlm.labs.token_measures import Cost, loss_of_cutting
from fastlm.tokenizer import BpeTrainer, Tokenizer
from tests.labs.conftest import failed
from tests.tokenizer import vocabularies
from tests.tokenizer.conftest import tiktoken_cache  # noqa: F401  (a fixture)

PAIRS = [("나는 책을 읽는다", "I read a book"), ("고양이가 잔다", "The cat sleeps"), ("비가 온다", "It rains")]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, shared_data) -> None:
    if shared_data is None:
        pytest.skip("the sentence pairs of ko-en are not there")
    monkeypatch.setattr(tokens, "SIZES", (512, 1024, 2048, 4096))
    monkeypatch.setattr(tokens, "OWN_SIZE", 8192)


def test_price_counts_what_tiktoken_counts(tiktoken_cache):  # noqa: F811
    cost = Cost(Tokenizer.from_tiktoken("cl100k_base"), PAIRS, seed=0)
    theirs = tiktoken.get_encoding("cl100k_base")
    korean, english = ([len(theirs.encode(text)) for text in side] for side in zip(*PAIRS, strict=True))
    assert cost.korean.tolist() == korean
    assert cost.english.tolist() == english
    assert cost.price.value == pytest.approx(sum(korean) / sum(english))
    assert cost.price.low <= cost.price.value <= cost.price.high


def test_a_vocabulary_of_bytes_prices_korean_by_its_bytes():
    in_bytes = sum(len(k.encode()) for k, _ in PAIRS) / sum(len(e.encode()) for _, e in PAIRS)
    bytes_alone = BpeTrainer(257).train_from_iterator(["x"])
    assert Cost(bytes_alone, PAIRS, seed=0).price.value == pytest.approx(in_bytes)


def test_losses_of_words_and_bytes():
    vocabulary = {b"the", b"cat", b"sat"}
    loss = loss_of_cutting(lambda text: [word.encode() for word in text.split()], vocabulary, ["the cat", "the  dog"])
    assert (loss.vocabulary, loss.pieces, loss.unknown, loss.unreadable) == (3, 2, 0.25, 0.5)
    assert loss.restored == 0.5  # two spaces are lost
    in_bytes = loss_of_cutting(
        lambda text: [bytes([b]) for b in text.encode()], {bytes([b]) for b in range(256)}, ["가a"]
    )
    assert (in_bytes.unknown, in_bytes.broken, in_bytes.restored) == (0, 0.75, 1)


@pytest.mark.parametrize("lang", ["ko", "en"])
def test_claims_about_our_vocabularies_hold(run, small, monkeypatch, tmp_path, lang):
    pytest.importorskip("kiwipiepy")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    pairs = tokens._pairs
    monkeypatch.setattr(tokens, "_pairs", lambda lab, part: pairs(lab, part)[: 1905 if lang == "en" else 800])
    monkeypatch.setattr(tokens, "LEVELS", {k: v for k, v in tokens.LEVELS.items() if k != "sentence"})
    result = run("tokens", lang=lang)
    assert failed(result) == []
    assert len(result.findings) == 3
    assert len(result.missing) == 4  # Gemma and three published vocabularies, each with the command that mends it
    assert sum("download=True" in line for line in result.missing) == 3


@pytest.mark.slow
def test_claims_about_published_vocabularies_hold(run, small, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabularies.tiktoken_files()))
    result = run("tokens", lang="en")
    assert failed(result) == []
    assert len(result.findings) == 4


def test_without_data_one_text_is_still_cut(run, tmp_path):
    result = run("tokens", lang="en", data=tmp_path)
    assert [row[0] for row in result.tables[0].rows] == ["character", "subword", "word", "sentence", "paragraph"]
    assert len(result.missing) == 3
    assert all("ko-en/" in line and "github.com" in line for line in result.missing)
