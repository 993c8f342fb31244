from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastlm.cli import app as application
from fastlm.training import TokenDataset

TEXT = "한 줄의 문장입니다.\n" * 300


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fastlm", "prepare", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        application.run()
    return int(caught.value.code or 0)


def test_text_is_prepared_and_counted(tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    assert call(monkeypatch, tmp_path / "a.txt", "--out", tmp_path / "out", "--vocab-size", 280, "--json") == 0
    result = json.loads(capfd.readouterr().out)
    dataset = TokenDataset(tmp_path / "out")
    assert result["train"] == {"tokens": len(dataset.train), "bytes": dataset.train.num_bytes, "documents": 1}
    assert result["train"]["bytes"] + result["valid"]["bytes"] == len(TEXT.encode())
    assert result["vocab_size"] == dataset.tokenizer.vocab_size


def test_the_same_tokenizer_can_be_used_for_other_text(tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    assert call(monkeypatch, tmp_path / "a.txt", "--out", tmp_path / "a", "--vocab-size", 280) == 0
    tokenizer = tmp_path / "a" / "tokenizer.json"
    assert call(monkeypatch, tmp_path / "a.txt", "--out", tmp_path / "b", "--tokenizer", tokenizer) == 0
    assert TokenDataset(tmp_path / "a").manifest.fingerprint == TokenDataset(tmp_path / "b").manifest.fingerprint


def test_a_directory_that_is_taken_is_one_line(tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    assert call(monkeypatch, tmp_path / "a.txt", "--out", tmp_path) == 1
    err = capfd.readouterr().err
    assert "exists already; give another directory" in err
    assert len(err.strip().splitlines()) == 1
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == TEXT


def test_rows_are_prepared_by_their_column_and_repeated_ones_are_left_out(tmp_path: Path, monkeypatch, capfd) -> None:
    rows = [{"body": f"문장 {i % 40}"} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--out", tmp_path / "out", "--vocab-size", 280, "--column", "body", "--deduplicate", "--json"]
    assert call(monkeypatch, tmp_path / "a.jsonl", *options) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["train"]["documents"] + result["valid"]["documents"] == 40
    assert result["duplicates"] == 10
