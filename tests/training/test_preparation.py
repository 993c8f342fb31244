from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastlm.errors import ConfigError, DataError, FastlmError, TokenizerError
from fastlm.tokenizer import Tokenizer
from fastlm.training import TokenDataset, prepare
from fastlm.training import preparation as module

LINES = "".join(f"line {i} 한글 문장입니다.\n" for i in range(200)).encode()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def text_of(dataset: TokenDataset, split: str) -> bytes:
    stream = getattr(dataset, split)
    ids = stream.read(0, len(stream))
    return dataset.tokenizer.decode_bytes([i for i in ids.tolist() if i != dataset.eos_token_id])


@pytest.mark.parametrize("chunk_bytes", [7, 100, 4 << 20])
def test_both_splits_together_are_the_file_and_validation_is_its_last_tenth(tmp_path, monkeypatch, chunk_bytes) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    dataset = prepare([write(tmp_path / "a.txt", LINES)], tmp_path / "out", vocab_size=300)
    train, valid = text_of(dataset, "train"), text_of(dataset, "valid")
    assert train + valid == LINES
    assert valid.startswith(b"line ")
    assert 0.1 * len(LINES) <= len(valid) < 0.1 * len(LINES) + 40
    assert dataset.train.num_bytes == len(train)
    assert dataset.valid.num_bytes == len(valid)
    assert dataset.train.read(0, 1)[0] == dataset.eos_token_id
    assert dataset.valid.read(0, 1)[0] == dataset.eos_token_id


def test_a_text_of_one_line_is_cut_between_characters(tmp_path: Path) -> None:
    data = ("가나다라마바사아자차카타파하" * 30).encode()
    dataset = prepare([write(tmp_path / "a.txt", data)], tmp_path / "out", vocab_size=300)
    assert text_of(dataset, "train") + text_of(dataset, "valid") == data
    text_of(dataset, "valid").decode()
    assert abs(dataset.valid.num_bytes - 0.1 * len(data)) <= 3


def test_several_files_are_split_each_and_begin_with_an_end_of_text_id(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.txt", LINES[: 1000 * i + 1000].rpartition(b"\n")[0] + b"\n") for i in range(3)]
    dataset = prepare(files, tmp_path / "out", vocab_size=300)
    ids = dataset.train.read(0, len(dataset.train))
    assert (ids == dataset.eos_token_id).sum() == 3
    assert [s["bytes"] for s in dataset.manifest.sources] == [f.stat().st_size for f in files]


def test_the_tokenizer_never_sees_validation_text(tmp_path: Path) -> None:
    data = b"aaaa bbbb\n" * 90 + b"zqzqzqzq\n" * 11
    dataset = prepare([write(tmp_path / "a.txt", data)], tmp_path / "out", vocab_size=300)
    assert not any(b"zq" in token for token in dataset.tokenizer.mergeable_ranks)


def test_shards_are_as_long_as_set_and_read_back_across_their_borders(tmp_path: Path, monkeypatch) -> None:
    whole = prepare([write(tmp_path / "a.txt", LINES)], tmp_path / "whole", vocab_size=300)
    monkeypatch.setattr(module, "CHUNK_BYTES", 500)
    monkeypatch.setattr(module, "SHARD_TOKENS", 300)
    cut = prepare([tmp_path / "a.txt"], tmp_path / "cut", tokenizer=whole.tokenizer)
    assert len(cut.manifest.splits["train"]["shards"]) > 3
    assert np.array_equal(cut.train.read(0, len(cut.train)), whole.train.read(0, len(whole.train)))
    assert np.array_equal(cut.train.read(290, 700), whole.train.read(290, 700))
    with pytest.raises(IndexError):
        cut.train.read(len(cut.train) - 1, 2)


def test_special_tokens_in_the_text_are_ordinary_text(tmp_path: Path) -> None:
    data = b"one <|endoftext|> two\n" * 50
    dataset = prepare([write(tmp_path / "a.txt", data)], tmp_path / "out", vocab_size=300)
    assert (dataset.train.read(0, len(dataset.train)) == dataset.eos_token_id).sum() == 1


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    ranks = {bytes([i]): i for i in range(256)}
    wide = Tokenizer(ranks, pattern="cl100k", special_tokens={"<|endoftext|>": 70_000})
    dataset = prepare([write(tmp_path / "a.txt", LINES)], tmp_path / "out", tokenizer=wide)
    assert dataset.manifest.dtype == "uint32"
    assert dataset.train.read(0, 1)[0] == 70_000


@pytest.mark.parametrize("position", [0, 1234, 3999])
def test_invalid_utf8_is_refused_with_its_byte_offset_and_nothing_is_left(tmp_path, monkeypatch, position) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 300)
    data = bytearray(b"plain text\n" * 500)
    data[position] = 0xFF
    with pytest.raises(DataError, match=rf"byte 0xff at offset {position}\b"):
        prepare([write(tmp_path / "a.txt", bytes(data))], tmp_path / "out", vocab_size=300)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "none.txt", "none.txt does not exist"),
        (lambda d: d, "is a directory; give a text file"),
        (lambda d: write(d / "e.txt", b""), "e.txt is empty"),
        (lambda d: write(d / "s.txt", b"x"), "too short to split"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare([make(tmp_path)], tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out").exists()


def test_options_that_make_no_sense_are_refused(tmp_path: Path, dataset: TokenDataset) -> None:
    file = write(tmp_path / "a.txt", LINES)
    with pytest.raises(ConfigError, match="256 bytes"):
        prepare([file], tmp_path / "out", vocab_size=200)
    with pytest.raises(ConfigError, match="not both"):
        prepare([file], tmp_path / "out", vocab_size=300, tokenizer=dataset.tokenizer)
    with pytest.raises(ConfigError, match="valid_fraction"):
        prepare([file], tmp_path / "out", valid_fraction=1.0)
    without_end = Tokenizer({bytes([i]): i for i in range(256)}, pattern="gpt2")
    with pytest.raises(ConfigError, match="no end-of-text token"):
        prepare([file], tmp_path / "out", tokenizer=without_end)
    (tmp_path / "taken").mkdir()
    write(tmp_path / "taken" / "file", b"mine")
    with pytest.raises(DataError, match="exists already"):
        prepare([file], tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_bytes() == b"mine"


def damage(directory: Path, kind: str) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    if kind == "no manifest":
        (directory / "manifest.json").unlink()
    elif kind == "manifest not JSON":
        (directory / "manifest.json").write_bytes(b'{"version"')
    elif kind == "count not a number":
        manifest["splits"]["train"]["shards"][0]["tokens"] = "many"
    elif kind == "shard elsewhere":
        manifest["splits"]["train"]["shards"][0]["file"] = "../../etc/passwd"
    elif kind == "split missing":
        del manifest["splits"]["valid"]
    elif kind == "shard missing":
        (directory / "train-00000.bin").unlink()
    elif kind == "shard truncated":
        path = directory / "train-00000.bin"
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "tokenizer corrupt":
        (directory / "tokenizer.json").write_bytes(b'{"model": ')
    elif kind == "another tokenizer":
        Tokenizer({bytes([i]): i for i in range(256)}, pattern="gpt2").save(directory / "tokenizer.json")
    if kind in ("count not a number", "shard elsewhere", "split missing"):
        (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no manifest", "holds no manifest.json: give text files, or a directory made by `fastlm prepare`"),
        ("manifest not JSON", "manifest.json is corrupt"),
        ("count not a number", "manifest.json is corrupt"),
        ("shard elsewhere", "outside the directory"),
        ("split missing", "manifest.json is corrupt"),
        ("shard missing", "train-00000.bin is missing"),
        ("shard truncated", "train-00000.bin is truncated"),
        ("tokenizer corrupt", "tokenizer.json"),
        ("another tokenizer", "is not the tokenizer that made these tokens"),
    ],
)
def test_a_damaged_directory_is_one_error_that_says_which_file(tmp_path: Path, kind: str, message: str) -> None:
    prepare([write(tmp_path / "a.txt", LINES)], tmp_path / "out", vocab_size=300)
    damage(tmp_path / "out", kind)
    with pytest.raises(FastlmError, match=message) as caught:
        TokenDataset(tmp_path / "out")
    assert isinstance(caught.value, TokenizerError if kind == "tokenizer corrupt" else DataError)
    assert "\n" not in str(caught.value)
