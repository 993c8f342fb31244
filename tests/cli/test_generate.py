# ruff: noqa: F811 (fixtures that are imported)
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm.cli import app as application
from fastlm.model import save_model
from tests.inference.conftest import model, tokenizer, transformer  # noqa: F401 (fixtures)


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model", eos_token_id=tokenizer.eos_token_id)
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    return tmp_path / "model"


def call(monkeypatch: pytest.MonkeyPatch, capfdbinary, *arguments: object) -> tuple[int, bytes, str]:
    monkeypatch.setattr(sys, "argv", ["fastlm", "generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        application.run()
    out, err = capfdbinary.readouterr()
    return int(caught.value.code or 0), out, err.decode()


def test_the_same_seed_prints_the_same_whole_characters(checkpoint: Path, monkeypatch, capfdbinary) -> None:
    shared = ["--checkpoint", checkpoint, "--prompt", "이 영화", "--max-tokens", 30]
    for temperature in (0.8, 3.0):
        for seed in range(4):
            options = [*shared, "--temperature", temperature, "--seed", seed]
            code, streamed, _ = call(monkeypatch, capfdbinary, *options)
            assert code == 0
            text = streamed.decode()  # raises on broken UTF-8
            assert text.startswith("이 영화")
            assert "\ufffd" not in text
            assert call(monkeypatch, capfdbinary, *options, "--no-stream")[1] == streamed
            result = json.loads(call(monkeypatch, capfdbinary, *options, "--json")[1])
            assert "이 영화" + result["completions"][0]["text"] + "\n" == text


def test_samples_have_seeds_that_follow_and_can_be_drawn_alone(checkpoint: Path, monkeypatch, capfdbinary) -> None:
    options = ["--checkpoint", checkpoint, "--prompt", "a", "--prompt", "이", "--max-tokens", 8, "--json"]
    result = json.loads(call(monkeypatch, capfdbinary, *options, "--num-samples", 2, "--seed", 5)[1])
    assert [(c["prompt"], c["seed"]) for c in result["completions"]] == [("a", 5), ("a", 6), ("이", 7), ("이", 8)]
    alone = ["--checkpoint", checkpoint, "--prompt", "이", "--max-tokens", 8, "--json", "--seed", 7]
    assert json.loads(call(monkeypatch, capfdbinary, *alone)[1])["completions"][0] == result["completions"][2]


def test_korean_is_read_and_printed_in_a_c_locale(transformer, tokenizer, tmp_path: Path) -> None:
    save_model(transformer, tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "fastlm", "generate", "-c", str(tmp_path), "-p", "이 영화", "-n", "5"]
    run = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.decode().startswith("이 영화")
    broken = subprocess.run([*command, "-p", b"\xec\x98"], capture_output=True, env=environment, timeout=120)
    assert broken.returncode == 1
    assert b"--prompt is not UTF-8" in broken.stderr


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda d: truncate(d / "model.safetensors"), [], "model.safetensors is truncated or corrupt"),
        (lambda d: truncate(d / "config.json"), [], "config.json is not valid JSON"),
        (lambda d: truncate(d / "tokenizer.json"), [], "tokenizer.json"),
        (lambda d: (d / "tokenizer.json").unlink(), [], "tokenizer.json"),
        (lambda d: (d / "config.json").unlink(), [], "config.json does not exist"),
        (lambda d: None, ["--temperature", -1], "temperature must be 0 or more"),
        (lambda d: None, ["--top-p", 2], "top_p must be above 0"),
        (lambda d: None, ["--num-samples", 0], "--num-samples must be a positive integer"),
    ],
)
def test_bad_input_is_one_line(checkpoint: Path, monkeypatch, capfdbinary, damage, options, message: str) -> None:
    damage(checkpoint)
    code, out, err = call(monkeypatch, capfdbinary, "--checkpoint", checkpoint, "--prompt", "a", *options)
    assert code == 1
    assert out == b""
    assert len(err.strip().splitlines()) == 1
    assert message in err
