from __future__ import annotations

import errno
import gzip
import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fastlm.errors import ConfigError, DataError, FastlmError, TokenizerError
from fastlm.tokenizer import Tokenizer
from fastlm.training import TokenDataset, documents, prepare
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
    monkeypatch.setattr(documents, "CHUNK_BYTES", chunk_bytes)
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
    monkeypatch.setattr(documents, "CHUNK_BYTES", 500)
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
    monkeypatch.setattr(documents, "CHUNK_BYTES", 300)
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


ROWS = [f"리뷰 {i} 번은 좋았다" if i % 3 else f"review {i} was bad" for i in range(300)]


def rows_file(path: Path, rows: list[str] = ROWS) -> Path:
    path.write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def documents_of(dataset: TokenDataset, split: str) -> list[str]:
    stream = getattr(dataset, split)
    ids = stream.read(0, len(stream))
    starts = [*np.flatnonzero(ids == dataset.eos_token_id), len(ids)]
    assert starts[0] == 0
    return [dataset.tokenizer.decode(ids[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)]


def test_each_row_is_a_document_of_one_split(tmp_path: Path) -> None:
    dataset = prepare([rows_file(tmp_path / "a.jsonl")], tmp_path / "out", vocab_size=300)
    train, valid = documents_of(dataset, "train"), documents_of(dataset, "valid")
    assert sorted(train + valid) == sorted(ROWS)
    assert train == [row for row in ROWS if row in set(train)]  # in their order
    assert 10 < len(valid) < 60
    counts = {name: split["documents"] for name, split in dataset.manifest.splits.items()}
    assert counts == {"train": len(train), "valid": len(valid)}


def test_every_format_gives_the_same_shards(tmp_path: Path, dataset: TokenDataset) -> None:
    tokenizer = dataset.tokenizer
    plain = rows_file(tmp_path / "a.jsonl")
    files = {
        "jsonl": plain,
        "jsonl.gz": write(tmp_path / "a.jsonl.gz", gzip.compress(plain.read_bytes())),
        "tsv": write(tmp_path / "a.tsv", ("text\n" + "\n".join(ROWS) + "\n").encode()),
        "csv": write(tmp_path / "a.csv", ("text,n\n" + "".join(f'"{row}",1\n' for row in ROWS)).encode()),
        "lines": write(tmp_path / "a.txt", ("\n\n".join(ROWS)).encode()),
    }
    fingerprints = {
        prepare([file], tmp_path / name, tokenizer=tokenizer, by_line=name == "lines").manifest.fingerprint
        for name, file in files.items()
    }
    assert len(fingerprints) == 1


def test_compressed_text_is_the_text(tmp_path: Path, dataset: TokenDataset, monkeypatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 300)
    for name, data in (("a.txt", LINES), ("a.txt.gz", gzip.compress(LINES))):
        prepare([write(tmp_path / name, data)], tmp_path / f"{name}.out", tokenizer=dataset.tokenizer)
    both = [TokenDataset(tmp_path / f"{name}.out") for name in ("a.txt", "a.txt.gz")]
    assert both[0].manifest.fingerprint == both[1].manifest.fingerprint
    assert text_of(both[1], "train") + text_of(both[1], "valid") == LINES


def test_the_result_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    files = [rows_file(tmp_path / f"{i}.jsonl", ROWS[i::3] + ROWS[:20]) for i in range(3)]
    one = prepare(files, tmp_path / "one", vocab_size=300)
    two = prepare(files, tmp_path / "two", vocab_size=300, workers=2)
    assert one.manifest == two.manifest


def test_a_repeated_document_is_left_out_on_request(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", [*ROWS, " " + ROWS[0], ROWS[5], ROWS[5]])
    assert prepare([file], tmp_path / "all", vocab_size=300).manifest.duplicates == 0
    dataset = prepare([file], tmp_path / "once", vocab_size=300, deduplicate=True)
    assert dataset.manifest.duplicates == 3
    assert sorted(documents_of(dataset, "train") + documents_of(dataset, "valid")) == sorted(ROWS)


def test_an_interrupted_preparation_goes_on_with_the_sources_that_are_missing(tmp_path: Path, monkeypatch) -> None:
    files = [rows_file(tmp_path / f"{i}.jsonl", ROWS[i::3]) for i in range(3)]
    whole = prepare(files, tmp_path / "whole", vocab_size=300)
    encode, encoded = module._encode, []

    def interrupted(tokenizer: Tokenizer, job) -> None:
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(job.index)
        encode(tokenizer, job)

    monkeypatch.setattr(module, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(files, tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out").exists()
    encoded.clear()
    assert prepare(files, tmp_path / "out", vocab_size=300).manifest == whole.manifest
    assert encoded == [2]
    assert not list(tmp_path.glob(".*"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_other_files_or_options_start_anew(tmp_path: Path, monkeypatch) -> None:
    files = [rows_file(tmp_path / f"{i}.jsonl", ROWS[i::2]) for i in range(2)]
    encode, interrupt = module._encode, [True]

    def interrupted(tokenizer: Tokenizer, job) -> None:
        encode(tokenizer, job)
        if interrupt[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(files, tmp_path / "out", vocab_size=300)
    interrupt[0] = False
    rows_file(files[0], [*ROWS[::2], "a new one"])
    dataset = prepare(files, tmp_path / "out", vocab_size=300)
    assert "a new one" in documents_of(dataset, "train") + documents_of(dataset, "valid")


def test_one_directory_is_prepared_by_one_process(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl")
    with module._locked(tmp_path / ".out.partial"), pytest.raises(DataError, match="another process is preparing"):
        prepare([file], tmp_path / "out", vocab_size=300)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (["one"], {}, "no document is left for the"),
        (ROWS, {"column": "body"}, "line 1: no 'body', but 'text'"),
        (ROWS, {"workers": 0}, "workers must be 1 or more"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_and_nothing_is_left(tmp_path, rows, options, message) -> None:
    with pytest.raises(FastlmError, match=message):
        prepare([rows_file(tmp_path / "a.jsonl", rows)], tmp_path / "out", vocab_size=300, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_shard_whose_content_changed_is_refused(tmp_path: Path) -> None:
    prepare([write(tmp_path / "a.txt", LINES)], tmp_path / "out", vocab_size=300)
    path = tmp_path / "out" / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00000\.bin is not what manifest\.json says"):
        TokenDataset(tmp_path / "out")


def test_an_empty_shard_among_others_is_nothing_and_one_that_should_not_be_empty_is_refused(tmp_path: Path) -> None:
    whole = prepare([write(tmp_path / "a.txt", LINES)], tmp_path / "out", vocab_size=300)
    ids = whole.train.read(0, len(whole.train))
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    empty = {"file": "train-00001.bin", "tokens": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    manifest["splits"]["train"]["shards"].insert(0, empty)
    path.write_text(json.dumps(manifest))
    write(tmp_path / "out" / "train-00001.bin", b"")
    again = TokenDataset(tmp_path / "out")
    assert np.array_equal(again.train.read(0, len(again.train)), ids)
    write(tmp_path / "out" / "train-00000.bin", b"")
    with pytest.raises(DataError, match=r"train-00000\.bin is truncated: 0 bytes of"):
        TokenDataset(tmp_path / "out")


def test_a_disk_that_fills_up_loses_no_source_that_is_done(tmp_path: Path, monkeypatch) -> None:
    files = [rows_file(tmp_path / f"{i}.jsonl", ROWS[i::3]) for i in range(3)]
    whole = prepare(files, tmp_path / "whole", vocab_size=300)
    written, shards = module.write_atomic, []

    def full(path: Path, data: bytes | str) -> None:
        if path.suffix == ".bin" and len(shards) == 4:  # two of each source
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        shards.extend([path.name] * (path.suffix == ".bin"))
        written(path, data)

    monkeypatch.setattr(module, "write_atomic", full)
    with pytest.raises(OSError, match="No space left on device"):
        prepare(files, tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out").exists()
    shards.clear()
    assert prepare(files, tmp_path / "out", vocab_size=300).manifest == whole.manifest
    assert shards == ["part-00002-train-00000.bin", "part-00002-valid-00000.bin"]


def test_an_id_that_no_token_has_is_refused_where_shards_are_too_large_to_hash(tmp_path: Path, monkeypatch) -> None:
    prepare([write(tmp_path / "a.txt", LINES)], tmp_path / "out", vocab_size=300)
    path = tmp_path / "out" / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[101] = 0xFF
    path.write_bytes(data)
    monkeypatch.setattr("fastlm.training.data.CHECKED_BYTES", 0)
    dataset = TokenDataset(tmp_path / "out")
    with pytest.raises(DataError, match="beyond the vocabulary of 300"):
        dataset.train.read(0, 60)
