# ruff: noqa: F811 (fixtures that are imported)
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm.cli import app as application
from fastlm.inference import LLM, Piece
from fastlm.model import ModelConfig, save_model
from tests.inference.conftest import one_thread, random_model, tokenizer  # noqa: F401 (fixtures)


@pytest.fixture
def directory(tokenizer, tmp_path: Path) -> Path:
    """A model whose context holds 64 tokens."""
    save_model(random_model(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, 64)), tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    return tmp_path / "model"


class Pipe:
    def __init__(self, data: bytes) -> None:
        self.buffer = data.splitlines(keepends=True)

    def isatty(self) -> bool:
        return False


def chat(monkeypatch, capfdbinary, directory: Path, lines: bytes, *options: object) -> tuple[int, bytes, str]:
    monkeypatch.setattr(sys, "argv", ["fastlm", "chat", "-m", str(directory), *map(str, options)])
    monkeypatch.setattr(sys, "stdin", Pipe(lines))
    with pytest.raises(SystemExit) as caught:
        application.run()
    out, err = capfdbinary.readouterr()
    return int(caught.value.code or 0), out, err.decode()


def test_lines_from_a_pipe_are_answered_and_the_conversation_is_remembered(directory, monkeypatch, capfdbinary) -> None:
    asked: list[list[dict]] = []

    def seen(tokenizer, messages, tools):
        asked.append([dict(m) for m in messages])
        from fastlm.inference.chat import ChatPrompt

        return ChatPrompt([7, 8])

    monkeypatch.setattr("fastlm.inference.llm.chat_prompt", seen)
    lines = "안녕\n\n뭐해\n/reset\n/system 짧게\n또\n/quit\n끝\n".encode()
    code, out, err = chat(monkeypatch, capfdbinary, directory, lines, "--max-tokens", 5, "--json")
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["prompt"] for a in answers] == ["안녕", "뭐해", "또"]
    assert [[m["role"] for m in messages] for messages in asked] == [
        ["user"], ["user", "assistant", "user"], ["system", "user"]
    ]  # fmt: skip
    assert asked[1][1]["content"] == answers[0]["text"]
    assert asked[2][0]["content"] == "짧게"
    assert "no chat template" in err


def test_settings_take_effect_and_the_same_seed_gives_the_same_answers(directory, monkeypatch, capfdbinary) -> None:
    lines = b"/temperature 0\n/max-tokens 4\na\n"
    code, out, _ = chat(monkeypatch, capfdbinary, directory, lines, "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 4 or json.loads(out)["finish_reason"] != "length"
    assert (
        chat(monkeypatch, capfdbinary, directory, lines, "--json", "--seed", 5)[1].split(b'"tokens_per')[0]
        == (out.split(b'"tokens_per')[0])
    )
    shown = chat(monkeypatch, capfdbinary, directory, lines)
    assert shown[1].decode().strip() == json.loads(out)["text"]
    assert "tokens/s" in shown[2]


def test_a_conversation_longer_than_the_context_forgets_its_oldest_turn(directory, monkeypatch, capfdbinary) -> None:
    code, out, err = chat(monkeypatch, capfdbinary, directory, b"a\nb\nc\nd\n", "--max-tokens", 2, "--json")
    assert code == 0
    assert len(out.splitlines()) == 4
    assert "its oldest turn is forgotten" in err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"/temperature warm\n", "/temperature needs a number, not 'warm'"),
        (b"/temperature -1\n", "temperature must be 0 or more"),
        (b"/dance\n", "there is no command /dance"),
        (b"\xff\n", "line 1 of the input is not UTF-8"),
        (b"a" * 200 + b"\n", "the model's context holds 64"),
    ],
)
def test_a_bad_line_from_a_pipe_is_one_line_of_error(directory, monkeypatch, capfdbinary, lines, message) -> None:
    code, _, err = chat(monkeypatch, capfdbinary, directory, lines)
    assert code == 1
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_an_interrupted_answer_is_kept_as_far_as_it_came(directory, monkeypatch, capfdbinary) -> None:
    asked: list[list[dict]] = []

    def interrupted(self, prompts, params):
        asked.append(prompts)
        yield Piece(0, " 반쯤", 1)
        yield Piece(0, " 온", 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", interrupted)
    code, out, _ = chat(monkeypatch, capfdbinary, directory, b"a\nb\n", "--json")
    assert code == 0
    answers = [json.loads(line) for line in out.decode().splitlines()]
    assert [(a["text"], a["finish_reason"]) for a in answers] == [("반쯤 온", "interrupted")] * 2
    assert asked[1][0] == "User: a\nAssistant: 반쯤 온\nUser: b\nAssistant:"


def test_korean_is_read_from_a_real_pipe_in_a_c_locale(directory) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "fastlm", "chat", "-m", str(directory), "-n", "3"]
    run = subprocess.run(command, input="영화\n".encode(), capture_output=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
    run.stdout.decode()
