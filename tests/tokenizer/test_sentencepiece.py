"""Merging over whole texts, on vocabularies made here: against Hugging Face's tokenizers."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from fastlm.errors import TokenizerError
from fastlm.tokenizer import Tokenizer
from fastlm.tokenizer.sentencepiece import BYTE_TOKENS, SentencePieceTokenizer, SpaceRules
from tests.tokenizer.hugging_face import random_text

DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def random_vocabulary(rng: random.Random, *, with_bytes: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces over few letters, "▁" among them and anywhere in a piece, and merges in any order."""
    letters = rng.choice(["ab▁", "abc▁", "가나▁ab"])
    strings = {"".join(rng.choices(letters, k=rng.randrange(2, 8))) for _ in range(rng.randrange(1, 50))}
    strings |= {string[: rng.randrange(1, len(string) + 1)] for string in strings}
    pieces = ["<unk>", *(BYTE_TOKENS if with_bytes else []), *sorted({*letters} | strings - {""})]
    ids = dict(zip(pieces, rng.sample(range(len(pieces)), len(pieces)), strict=True))
    plain = [piece for piece in pieces if not piece.startswith("<")]
    pairs = [(a, b) for a in plain for b in plain if a + b in ids]
    return ids, rng.sample(pairs, rng.randrange(len(pairs) + 1))


def hugging_face(ids: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    model = models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, **options)
    theirs = tokenizers.Tokenizer(model)
    theirs.normalizer = normalizers.Replace(" ", "▁")
    theirs.decoder = decoders.Sequence(DECODER)
    return theirs


def load(tmp_path: Path, theirs: tokenizers.Tokenizer) -> Tokenizer:
    theirs.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.from_huggingface(tmp_path / "tokenizer.json")


def some_texts(rng: random.Random) -> list[str]:
    letters = rng.choice(["abc가나 ", "ab  ", "a", "ab▁ ", "a가\U0001f600é\ud7ff "])
    return ["".join(rng.choices(letters, k=k)) for k in (0, 1, 2, 3, 9, 31, 63, 64, 65, 66, 300)]


@pytest.mark.parametrize("with_bytes", [True, False])
@pytest.mark.parametrize("fuse_unk", [True, False])
def test_ids_equal_hugging_face_for_any_merges(
    with_bytes: bool, fuse_unk: bool, tmp_path: Path, fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(60):
        ids, merges = random_vocabulary(rng, with_bytes=with_bytes)
        theirs = hugging_face(ids, merges, fuse_unk=fuse_unk)
        ours = load(tmp_path, theirs)
        assert isinstance(ours, SentencePieceTokenizer)
        for text in some_texts(rng):
            expected = theirs.encode(text)
            found, offsets = ours.encode_with_offsets(text)
            assert found == ours.encode(text) == expected.ids, (ids, merges, text)
            assert ours.encode_to_numpy(text).tolist() == expected.ids
            assert offsets == [begin for begin, _ in expected.offsets], (ids, merges, text)
        batch = some_texts(rng) * 3
        for num_threads in (1, 3):
            assert ours.encode_batch(batch, num_threads=num_threads) == [theirs.encode(text).ids for text in batch]


def space_rules() -> list[tuple[Any, Any, bool]]:
    """(normalizer, pre-tokenizer, whether decoding strips)."""
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found: list[tuple[Any, Any, bool]] = [(prepend, None, True), (normalizers.Replace(" ", "▁"), None, False)]
    nfkc = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found += [
        (nfkc, None, True),
        (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False),
    ]
    for scheme in ("first", "always", "never"):
        for split in (True, False):
            found.append((None, pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split), scheme != "never"))
    return found


@pytest.mark.parametrize("rule", range(len(space_rules())))
@pytest.mark.parametrize("normalized", [True, False])
def test_spaces_and_added_tokens_are_treated_as_by_hugging_face(
    rule: int, normalized: bool, tmp_path: Path, fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    normalizer, pre_tokenizer, strip = space_rules()[rule]
    for _ in range(12):
        ids, merges = random_vocabulary(rng, with_bytes=True)
        theirs = hugging_face(ids, merges, fuse_unk=True)
        theirs.normalizer = normalizer
        theirs.pre_tokenizer = pre_tokenizer
        theirs.decoder = decoders.Sequence([*DECODER, *([decoders.Strip(" ", 1, 0)] if strip else [])])
        theirs.add_special_tokens([tokenizers.AddedToken("<s>", normalized=normalized), "</s>"])
        theirs.add_tokens(
            [tokenizers.AddedToken("ba", normalized=normalized), tokenizers.AddedToken("  ", normalized=False)]
        )
        theirs.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(t, theirs.token_to_id(t)) for t in ("<s>", "</s>")]
        )
        ours = load(tmp_path, theirs)
        ours.save(tmp_path / "again.json")
        again = tokenizers.Tokenizer.from_file(str(tmp_path / "again.json"))
        for _ in range(30):
            text = "".join(
                rng.choices(["a", "b", "ba", " ", "  ", "가", "▁", "<s>", "</s>", "ﬁ", "\n", "é"], k=rng.randrange(9))
            )
            expected = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, allowed_special="all") == expected, (ids, merges, text)
            assert again.encode(text, add_special_tokens=False).ids == expected, (ids, merges, text)
            assert ours.encode(text, allowed_special="all", add_special_tokens=True) == theirs.encode(text).ids
            assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=False)
            stream = ours.decode_stream()
            assert "".join(map(stream.push, expected)) + stream.finish() == ours.decode(expected)


def test_scores_merge_the_best_piece_first_and_the_leftmost_among_equals(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(150):
        ids, _ = random_vocabulary(rng, with_bytes=True)
        scores = {piece: float(rng.randrange(8)) for piece in ids if not piece.startswith("<")}
        ours = SentencePieceTokenizer(ids, scores=scores, unknown="<unk>")
        for text in some_texts(rng):
            symbols = list(text.replace(" ", "▁"))
            while True:
                pairs = [(scores.get(a + b, -1.0), -i) for i, (a, b) in enumerate(pairwise(symbols))]
                best = max(pairs, default=(-1.0, 0))
                if best[0] < 0:
                    break
                at = -best[1]
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            expected = [
                i
                for symbol in symbols
                for i in ([ids[symbol]] if symbol in scores else [ids[BYTE_TOKENS[b]] for b in symbol.encode()])
            ]
            assert ours.encode(text) == expected, (scores, text)


def test_long_texts_take_little_time_and_memory() -> None:
    # Merging that is quadratic in the length of a text would take days.
    pieces = {"<unk>": 0, "▁": 1, "a": 2, "aa": 3, "aaaa": 4, "▁a": 5}
    ours = SentencePieceTokenizer(
        pieces, merges=[("a", "a"), ("aa", "aa"), ("▁", "a")], unknown="<unk>", fuse_unknown=True
    )
    ids = ours.encode_to_numpy("a" * 4_000_003)
    assert len(ids) == 1_000_002
    assert len(ours.encode_to_numpy("a " * 1_000_000)) == 1_000_001
    assert ours.encode("é" * 1_000_000) == [0]


def test_bytes_that_are_not_utf8_become_their_tokens_and_decode_gives_them_back() -> None:
    pieces = {token: i for i, token in enumerate(["<unk>", *BYTE_TOKENS, "▁", "a", "▁a"])}
    ours = SentencePieceTokenizer(pieces, merges=[("▁", "a")])
    data = b" a\xff\xed\xa0a\x80 \xe2\x96"
    ids = ours.encode_bytes(data)
    assert ours.decode_bytes(ids) == data
    assert ids[:2] == [pieces["▁a"], pieces["<0xFF>"]]
    without = SentencePieceTokenizer({"<unk>": 0, "a": 1}, merges=[], unknown="<unk>")
    with pytest.raises(TokenizerError, match="no tokens for bytes that are not UTF-8"):
        without.encode_bytes(b"a\xff")


def test_lone_surrogates_become_the_replacement_character(tmp_path: Path) -> None:
    ours = SentencePieceTokenizer({token: i for i, token in enumerate(BYTE_TOKENS)}, merges=[])
    assert ours.decode(ours.encode("a\ud800\ud83d\ude00")) == "a\ufffd\U0001f600"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pieces": {}, "merges": []}, "neither an unknown token"),
        ({"pieces": {"a": 0}, "merges": []}, "neither an unknown token nor one for each byte"),
        ({"pieces": {"<unk>": 0, "": 1}, "merges": []}, "token 1 is empty"),
        ({"pieces": {"<unk>": 0, "a": 0}, "merges": []}, "two tokens have the id 0"),
        ({"pieces": {"<unk>": 0, "\ud800": 1}}, "surrogates"),
        ({"pieces": {"<unk>": 0, "a": -1}, "merges": []}, "the id -1, not in 0"),
        ({"pieces": {"<unk>": 0, "a": 1 << 40}, "merges": []}, "the id 1099511627776"),
        ({"pieces": {"<unk>": 0, "a": 1 << 25}, "merges": []}, "not in 0 … 16777215"),
        ({"merges": [("a", "b")]}, "makes something that is no piece"),
        ({"merges": [("a", "z")]}, "which is no piece"),
        ({"merges": [("a", "a"), ("a", "a")]}, "twice"),
        ({"merges": None}, "either merges or scores"),
        ({"merges": None, "scores": {"a": float("nan")}}, "not a number"),
        ({"special_tokens": {"": 9}}, "special token is empty"),
    ],
)
def test_impossible_vocabularies_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"pieces": {"<unk>": 0, "a": 1, "b": 2, "aa": 3}, "merges": [("a", "a")]} | changes
    with pytest.raises(TokenizerError, match=message):
        SentencePieceTokenizer(arguments.pop("pieces"), unknown="<unk>", **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": None}, "decoder None"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer Whitespace of a SentencePiece"),
        ({"normalizer": None}, "byte_fallback with the normalizer None"),
        ({"model": {"ignore_merges": True}}, "ignore_merges of a SentencePiece"),
        ({"model": {"unk_token": "<none>"}}, "unk_token '<none>' is not in the vocab"),
        ({"model": {"unk_token": 3}}, "unk_token is no string"),
        ({"model": {"vocab": {"a": 0, "b": 0}}}, "same id"),
        ({"model": {"vocab": {"a": 0, "": 1}}}, "is empty"),
        ({"model": {"merges": [["a", "b"]]}}, "needs the token 'ab'"),
        ({"model": {"merges": ["a"]}}, "not a pair"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [], "special_tokens": {}}}, "with 0 texts"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [1], "special_tokens": {}}}, "is not understood"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "no single template"),
    ],
)
def test_files_that_ask_for_more_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    theirs = hugging_face({"<unk>": 0, "a": 1, "b": 2, "aa": 3, "▁": 4}, [("a", "a")])
    document = json.loads(theirs.to_str())
    for key, value in change.items():
        document[key] = document[key] | value if key == "model" else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_huggingface(tmp_path / "tokenizer.json")


def test_spaces_that_split_are_kept_apart() -> None:
    pieces = {"<unk>": 0, "▁": 1, "a": 2, "a▁": 3, "▁▁": 4}
    merges = [("▁", "▁"), ("a", "▁")]
    joined = SentencePieceTokenizer(pieces, merges=merges, unknown="<unk>")
    split = SentencePieceTokenizer(pieces, merges=merges, unknown="<unk>", spaces=SpaceRules(split=True))
    assert joined.encode("a  a ") == [2, 4, 3]
    assert split.encode("a  a ") == [2, 1, 1, 2, 1]


def test_random_unicode_round_trips(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", *"가나다한국어", "\U0001f600"]
    pieces = {token: i for i, token in enumerate([*BYTE_TOKENS, *letters, "th", "the", "▁the", "한국"])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("한", "국")]
    ours = SentencePieceTokenizer(pieces, merges=merges, spaces=SpaceRules(prefix="always", strip=True))
    for _ in range(500):
        text = random_text(rng, rng.randrange(60)).replace("▁", "")
        assert ours.decode(ours.encode(text), errors="strict") == text
