"""The differential fuzzer: it draws what it says, finds what differs, and finds nothing where nothing does."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from fastlm.benchmarks import fuzz_tokenizer
from fastlm.benchmarks.fuzz_texts import FuzzTexts
from fastlm.benchmarks.fuzz_tokenizer import Pair, fuzz, pairs, shorten
from tokenizers import decoders, models, normalizers
from typer.testing import CliRunner

from fastlm.cli.app import app
from fastlm.errors import ConfigError
from fastlm.tokenizer.sentencepiece import BYTE_TOKENS
from tests.tokenizer.conftest import EMOJI, KOREAN
from tests.tokenizer.hugging_face import train

TEXTS = 2500


def test_texts_cover_every_plane_and_category_and_repeat_with_their_seed() -> None:
    texts = FuzzTexts(1)
    drawn = [texts.draw() for _ in range(6000)]
    again = FuzzTexts(1)
    assert drawn == [again.draw() for _ in range(6000)]
    characters = set("".join(drawn))
    assert {ord(char) >> 16 for char in characters} == set(range(17))
    every = {unicodedata.category(chr(code)) for code in range(0x110000)} - {"Cs"}
    assert {unicodedata.category(char) for char in characters} == every
    assert any(len(text) > 1000 for text in drawn)
    assert any("\r\n" in text for text in drawn)
    assert any("\u1100" <= char <= "\u11ff" for char in characters)
    surrogates, without_e = FuzzTexts(2, with_surrogates=True), FuzzTexts(3, frozenset("e"))
    assert any("\ud800" <= char < "\ue000" for char in "".join(surrogates.draw() for _ in range(500)))
    assert "e" not in "".join(without_e.draw() for _ in range(2000))


@pytest.mark.parametrize("pattern", ["gpt2", "llama3", "qwen2", "o200k", "cl100k"])
def test_ids_of_byte_level_vocabularies_equal_hugging_face(pattern: str, tmp_path: Path, fresh_seed: int) -> None:
    theirs = train([KOREAN, EMOJI, "the they'll THE 123 1234\n\n  x"], pattern, 800, ["<|endoftext|>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    (pair,) = pairs([tmp_path])
    *_, outcome = fuzz(pair, TEXTS, fresh_seed)
    assert (outcome.strings, outcome.differences) == (TEXTS, [])


@pytest.mark.parametrize("prepends", [True, False])
def test_ids_of_sentencepiece_vocabularies_equal_hugging_face(prepends: bool, tmp_path: Path, fresh_seed: int) -> None:
    words = ["▁", *"abcdehlnostuy다는한국어ᄀ", "th", "▁th", "▁the", "한국", "▁한국", "ab", "aa", "▁▁"]
    ids = {token: i for i, token in enumerate(["<unk>", *BYTE_TOKENS, *words])}
    merges = [("▁", "▁"), ("t", "h"), ("▁", "th"), ("▁th", "e"), ("한", "국"), ("▁", "한국"), ("a", "a"), ("a", "b")]
    theirs = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    to_meta = normalizers.Replace(" ", "▁")
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_meta]) if prepends else to_meta
    theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    theirs.save(str(tmp_path / "tokenizer.json"))
    (pair,) = pairs([tmp_path])
    *_, outcome = fuzz(pair, TEXTS, fresh_seed)
    assert (outcome.strings, outcome.differences) == (TEXTS, [])


def test_ids_equal_tiktoken_for_text_and_for_bytes(tiktoken_cache: Path, fresh_seed: int) -> None:
    found = list(pairs([]))
    assert {"cl100k_base", "o200k_base", "bytes, gpt2"} <= {pair.vocabulary for pair in found}
    for pair in found:
        *_, outcome = fuzz(pair, TEXTS // 5, fresh_seed)
        assert outcome.differences == [], pair.vocabulary


def test_a_difference_is_found_and_made_short() -> None:
    ours = list(map(ord, "abc"))
    pair = Pair("v", "r", lambda text: ours if "q" in text else [], lambda text: [], frozenset())
    *_, outcome = fuzz(pair, 3000, 7)
    assert outcome.num_differences > 5
    assert [difference["text"] for difference in outcome.differences] == ["'q'"] * 5
    assert shorten("xxabxxcxx", lambda text: "a" in text and "c" in text) == "ac"


def test_command_reports_and_fails_on_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiktoken_cache: Path
) -> None:
    train([KOREAN], "gpt2", 300).save(str(tmp_path / "tokenizer.json"))
    arguments = ["bench", "tokenizer", "--fuzz", "50", "--fuzz-with", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "50 texts, 0 differ from tokenizers" in result.output
    result = CliRunner().invoke(app, [*arguments, "--json", "-"])
    assert json.loads(result.stdout)["outcomes"][0]["strings"] == 50
    wrong = Pair("v", "r", lambda text: [1], lambda text: [2], frozenset())
    monkeypatch.setattr(fuzz_tokenizer, "pairs", lambda paths: [wrong])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "50 differ from r" in result.output
    with pytest.raises(ConfigError, match="--fuzz is for the tokenizer"):
        CliRunner().invoke(app, ["bench", "sampling", "--fuzz", "5"], catch_exceptions=False)
