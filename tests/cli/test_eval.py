# ruff: noqa: F811 (fixtures that are imported)
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastlm.cli import app as application
from fastlm.inference import LLM
from fastlm.inference.evaluation import score_text
from fastlm.model import save_model
from tests.inference.conftest import TEXT, model, one_thread, tokenizer  # noqa: F401 (fixtures)


@pytest.fixture
def directory(model, tokenizer, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    return tmp_path / "model"


def call(monkeypatch, capfd, directory: Path, *options: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fastlm", "eval", "-m", str(directory), *map(str, options)])
    with pytest.raises(SystemExit) as caught:
        application.run()
    return int(caught.value.code or 0), *capfd.readouterr()


def test_a_text_is_scored_in_bits_per_byte(directory, tmp_path, monkeypatch, capfd) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:300], "utf-8")
    code, out, _ = call(
        monkeypatch, capfd, directory, "--text", tmp_path / "text.txt", "--context-length", 32, "--json"
    )
    assert code == 0
    result = json.loads(out)
    with LLM(directory) as llm:
        *_, expected = score_text(llm, TEXT[:300], context_length=32)
    assert result["bits_per_byte"] == pytest.approx(expected.bits_per_byte, abs=1e-3)
    assert result["bytes"] == len(TEXT[:300].encode())
    code, out, _ = call(monkeypatch, capfd, directory, "--text", tmp_path / "text.txt")
    assert code == 0
    assert "bits per byte" in out


def test_questions_are_answered(directory, tmp_path, monkeypatch, capfd) -> None:
    rows = [{"prompt": "영화", "choices": ["는", "가", "좋았다"], "answer": i % 3} for i in range(20)]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    code, out, _ = call(monkeypatch, capfd, directory, "--choices", path, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["accuracy"] in (6 / 20, 7 / 20)  # the same choice for each of the same questions
    assert result["accuracy_of_chance"] == pytest.approx(1 / 3, abs=1e-4)
    assert result["questions"] == 20


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--text", b"", "no token to score"),
        ("--text", b"\xff", "is not UTF-8 at byte 0"),
        ("--text", None, "does not exist"),
        ("--choices", b"\n", "holds no questions"),
        ("--choices", b'{"prompt": "a", "choices": ["b"], "answer": 1}', "line 1 must be a JSON object"),
        ("--choices", b'{"prompt": "a", "choices": "bc", "answer": 0}', "line 1 must be a JSON object"),
        ("--choices", b"{", "line 1 must be a JSON object"),
    ],
)
def test_bad_input_is_one_line(directory, tmp_path, monkeypatch, capfd, option, content, message) -> None:
    path = tmp_path / "input"
    if content is not None:
        path.write_bytes(content)
    code, out, err = call(monkeypatch, capfd, directory, option, path)
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 1
    assert message in err
    assert "either --text or --choices" in call(monkeypatch, capfd, directory)[2]
