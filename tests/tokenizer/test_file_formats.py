"""GGUF, tekken.json and tokenizer.model files made here, whole and damaged."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from fastlm._gguf import GgufFile
from fastlm.errors import CheckpointError, TokenizerError
from fastlm.tokenizer import Tokenizer
from fastlm.tokenizer.byte_level import to_chars
from fastlm.tokenizer.patterns import SEQUENCES
from fastlm.tokenizer.sentencepiece import BYTE_TOKENS
from tests.tokenizer import hugging_face as hf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MESSAGES_END = "\n"


def gguf_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str | bytes):
        return struct.pack("<I", 8) + gguf_string(value)
    kind = {int: 5, float: 6, str: 8, bytes: 8}[type(value[0])] if value else 4
    items = b"".join(
        gguf_string(item) if kind == 8 else struct.pack("<i" if kind == 5 else "<f", item) for item in value
    )
    return struct.pack("<IIQ", 9, kind, len(value)) + items


def gguf(metadata: dict[str, Any], version: int = 3) -> bytes:
    pairs = b"".join(gguf_string(key) + gguf_value(value) for key, value in metadata.items())
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(metadata)) + pairs + b"\0" * 64


def llama_metadata() -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, "▁", "a", "b", "ab", "▁ab", "<tool>"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 5, USER_DEFINED]
    return {
        "general.name": "small",
        "some.list": [1, 2, 3],
        "some.words": ["x", "y"],
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }


def gpt2_metadata() -> dict[str, Any]:
    tokens = [to_chars(bytes([i])) for i in range(256)] + ["ab", "Ġab", "<|end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[NORMAL] * 258, CONTROL],
        "tokenizer.ggml.merges": ["a b", "Ġ ab"],
        "tokenizer.ggml.eos_token_id": 258,
    }


def load(tmp_path: Path, metadata: dict[str, Any]) -> Tokenizer:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(metadata))
    return Tokenizer.from_file(path)


def test_llama_gguf_is_read(tmp_path: Path) -> None:
    ours = load(tmp_path, llama_metadata())
    assert ours.encode("ab", add_special_tokens=True) == [1, 263]
    assert ours.encode("é<tool>ab") == [259, 198, 172, 264, 263]
    assert ours.encode("<s>", allowed_special="all") == [1]
    assert ours.decode(ours.encode("ab ab é")) == "ab ab é"
    assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (1, 2, 265)
    assert ours.settings.chat_template == "{{ messages }}"
    assert load(tmp_path, llama_metadata() | {"tokenizer.ggml.add_space_prefix": False}).encode("ab") == [262]


def test_gpt2_gguf_is_read(tmp_path: Path) -> None:
    ours = load(tmp_path, gpt2_metadata())
    assert ours.pattern == "llama3"
    assert ours.encode("ab ab<|end|>", allowed_special="all") == [256, 257, 258]
    assert ours.eos_token_id == 258
    assert ours.decode([256, 258]) == "ab<|end|>"


def test_a_vocabulary_is_read_from_a_file_whose_tensors_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = bytearray(gguf(llama_metadata()))
    struct.pack_into("<Q", data, 8, 3)  # tensors that it says it has
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        GgufFile(path)
    file = GgufFile(path, metadata_only=True)
    assert (file.array("some.list"), file.array("some.words")) == ([1, 2, 3], [b"x", b"y"])
    assert Tokenizer.from_gguf(path).encode("ab") == load(tmp_path, llama_metadata()).encode("ab")


def changed(base: Callable[[], dict[str, Any]], **changes: Any) -> dict[str, Any]:
    found = base()
    for key, value in changes.items():
        name = f"tokenizer.ggml.{key}"
        if value is None:
            del found[name]
        else:
            found[name] = value(found[name]) if callable(value) else value
    return found


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "holds no vocabulary"),
        (changed(llama_metadata, model="bert"), "model 'bert' is not supported"),
        (changed(llama_metadata, model=3), "model is a int, where a str belongs"),
        (changed(llama_metadata, tokens=None), "has no tokenizer.ggml.tokens"),
        (changed(llama_metadata, tokens=[]), "has no tokenizer.ggml.tokens"),
        (changed(llama_metadata, tokens=[1, 2]), "no UTF-8 string"),
        (changed(llama_metadata, tokens=lambda t: [b"\xff", *[x.encode() for x in t[1:]]]), "no UTF-8 string"),
        (changed(llama_metadata, tokens=lambda t: ["a", *t[1:]]), None),
        (changed(llama_metadata, tokens=lambda t: [*t[:-2], "ab", t[-1]]), "empty or there twice: 'ab'"),
        (changed(llama_metadata, tokens=lambda t: [*t[:-2], "", t[-1]]), "empty or there twice"),
        (changed(llama_metadata, token_type=lambda t: t[1:]), "does not give each token a type"),
        (changed(llama_metadata, token_type=lambda t: [9, *t[1:]]), "does not give each token a type"),
        (changed(llama_metadata, token_type=lambda t: [UNUSED, *t[1:]]), "type unused are not supported"),
        (changed(llama_metadata, scores=lambda s: s[1:]), "does not give each token a score"),
        (changed(llama_metadata, scores=None), "does not give each token a score"),
        (changed(llama_metadata, scores=lambda s: [float("nan")] * len(s)), "not a number"),
        (changed(llama_metadata, bos_token_id=9999), "outside the vocabulary"),
        (changed(llama_metadata, remove_extra_whitespaces=True), "normalizes text is not supported"),
        (changed(gpt2_metadata, pre="martian"), "pre 'martian' is not supported"),
        (changed(gpt2_metadata, pre=None), "does not say how text is split"),
        (changed(gpt2_metadata, merges=None), "has no tokenizer.ggml.merges"),
        (changed(gpt2_metadata, merges=["a b", "q z"]), "needs the token b'qz'"),
        (changed(gpt2_metadata, merges=["a b", "a b"]), "twice"),
        (changed(gpt2_metadata, merges=["한 b"]), "not a pair of tokens"),
        (changed(gpt2_metadata, merges=["Ġ ab", "a b"]), "another order"),
        (changed(gpt2_metadata, tokens=lambda t: ["가", *t[1:]]), "byte 0 has no token"),
    ],
)
def test_gguf_that_cannot_be_read_is_refused_by_name(
    metadata: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    if message is None:
        with pytest.raises(TokenizerError):
            load(tmp_path, metadata)
        return
    with pytest.raises(TokenizerError, match=message) as caught:
        load(tmp_path, metadata)
    assert MESSAGES_END not in str(caught.value)


def test_gguf_of_other_versions_and_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for data, message in (
        (b"", "is empty|no valid JSON"),
        (b"GGUF", "cut short"),
        (gguf(llama_metadata(), version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), f"claims 0 tensors and {1 << 60} keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60) + b"\0" * 64, f"a name of {1 << 60} bytes"),
    ):
        path.write_bytes(data)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_file(path)
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer.from_gguf(tmp_path / "absent.gguf")
    with pytest.raises(TokenizerError, match="holds none of"):
        Tokenizer.from_file(tmp_path / "nothing") if (tmp_path / "nothing").mkdir() is None else None


def varint(value: int) -> bytes:
    out = b""
    while True:
        value, low = value >> 7, value & 127
        out += bytes([low | (128 if value else 0)])
        if not value:
            return out


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model_file(kind: int = 2, prefix: bool = True, normalizer: bytes = b"") -> bytes:
    metadata = llama_metadata()
    pieces = b"".join(
        field(1, field(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, type_))
        for piece, score, type_ in zip(
            *(metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")), strict=True
        )
    )
    return pieces + field(2, field(3, kind)) + field(3, normalizer + field(3, int(prefix)) + field(4, 0))


def test_model_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file())
    ours = Tokenizer.from_file(tmp_path)
    assert ours.encode("ab ab", add_special_tokens=True) == [1, 263, 263]
    assert ours.decode([263, 263]) == "ab ab"
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
    path.write_bytes(model_file(prefix=False))
    assert Tokenizer.from_file(path).encode("ab ab") == [262, 263]
    for data, message in (
        (model_file(kind=1), "kind 'unigram' is not supported"),
        (model_file(normalizer=field(2, b"map")), "normalizes text"),
        (b"", "0 pieces"),
        (b"\xff" * 30, "no tokenizer.model"),
        (model_file()[:-1], "no tokenizer.model"),
        (field(1, field(1, b"a") + field(3, 5)) + field(2, field(3, 2)) + field(3, field(4, 0)), "unused"),
        (field(1, field(1, b"a")) * 2 + field(2, field(3, 2)) + field(3, field(4, 0)), "twice"),
    ):
        path.write_bytes(data)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_file(path)


def tekken(**changes: Any) -> dict[str, Any]:
    tokens = [*(bytes([i]) for i in range(256)), b"ab", b" ab", b"beyond"]
    return {
        "config": {
            "pattern": SEQUENCES["tekken"][0],
            "default_vocab_size": 268,
            "default_num_special_tokens": 10,
        }
        | changes.pop("config", {}),
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for i, token in enumerate(tokens)
        ],
    } | changes


def test_tekken_is_read(tmp_path: Path, fresh_seed: int) -> None:
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(tekken()))
    ours = Tokenizer.from_file(tmp_path)
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in tekken()["vocab"][:258]}
    theirs = tiktoken.Encoding("t", pat_str=SEQUENCES["tekken"][0], mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(fresh_seed)
    for _ in range(300):
        text = hf.random_text(rng, 20) + "ab ab"
        assert ours.encode_ordinary(text) == [i + 10 for i in theirs.encode_ordinary(text)]
    assert ours.encode("ab[INST]", allowed_special="all", add_special_tokens=True) == [1, 266, 3]
    specials = [{"rank": 4, "token_str": "[MINE]", "is_control": True}]
    path.write_text(json.dumps(tekken(special_tokens=specials)))
    assert Tokenizer.from_file(path).special_tokens == {f"<SPECIAL_{i}>": i for i in range(10) if i != 4} | {
        "[MINE]": 4
    }
    for document, message in (
        ([], "no config and vocab"),
        (tekken(config={"pattern": None}), "lacks the pattern"),
        (tekken(config={"pattern": "("}), "nor a regular"),
        (tekken(config={"default_vocab_size": 400}), "asks for 400 ids"),
        (tekken(config={"default_num_special_tokens": -1}), "asks for"),
        (tekken(vocab=[{"rank": 0, "token_bytes": "@@"}] * 300), "vocab entry 0"),
        (tekken(vocab=tekken()["vocab"][:100] * 3), "vocab entry 100"),
        (tekken(special_tokens=[{"rank": 10, "token_str": "x"}]), "special token .*no valid rank"),
        (tekken(special_tokens=[{"rank": 1, "token_str": "<SPECIAL_2>"}]), "spelled alike"),
    ):
        path.write_text(json.dumps(document))
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_file(path)
    path.write_text("{")
    with pytest.raises(TokenizerError, match="no valid JSON"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("llama.gguf", gguf(llama_metadata())),
        ("gpt2.gguf", gguf(gpt2_metadata())),
        ("tokenizer.model", model_file()),
        ("tekken.json", json.dumps(tekken()).encode()),
    ],
)
def test_mutated_files_load_or_raise_tokenizer_error(name: str, data: bytes, tmp_path: Path, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    path = tmp_path / name
    messages = []
    for i in range(600):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(min(len(data), rng.choice([64, 400, len(data)])))
            damaged[at] = rng.choice([0, 1, 127, 128, 255, damaged[at] ^ 1 << rng.randrange(8), rng.randrange(256)])
        if i % 5 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        elif i % 5 == 1:
            at = rng.randrange(len(damaged))
            damaged[at:at] = damaged[at : at + rng.choice([1, 4, 8, 40])]
        path.write_bytes(damaged)
        try:
            ours = Tokenizer.from_file(path)
            ids = ours.encode("ab é<tool> 한\n", disallowed_special=())
            ours.decode(ids)
        except TokenizerError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)
