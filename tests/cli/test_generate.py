# ruff: noqa: F811 (fixtures that are imported)
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm.cli import app as application
from fastlm.cli.prompt_files import ResultFile
from fastlm.model import save_model
from tests.inference.conftest import model, one_thread, tokenizer, transformer  # noqa: F401 (fixtures)


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


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    rows = [{"prompt": f"이 영화 {i}", "id": f"q{i}"} for i in range(7)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '\n"한 줄"\n', "utf-8")
    return path


def test_a_file_of_prompts_gives_a_row_each_in_order_with_its_fields(
    checkpoint, prompts_file, tmp_path, monkeypatch, capfdbinary
) -> None:
    out = tmp_path / "out.jsonl"
    options = ["-m", checkpoint, "-f", prompts_file, "-n", 6, "--num-samples", 2, "--seed", 3, "--out", out]
    code, _, err = call(monkeypatch, capfdbinary, *options)
    assert (code, "16 rows, 0 of them from before" in err) == (0, True)
    rows = rows_of(out)
    assert [(r["index"], r["sample"], r["seed"]) for r in rows] == [(i // 2, i % 2, 3 + i) for i in range(16)]
    assert [r.get("id") for r in rows[:4]] == ["q0", "q0", "q1", "q1"]
    assert rows[14]["prompt"] == "한 줄"
    alone = ["-m", checkpoint, "-p", rows[5]["prompt"], "-n", 6, "--seed", rows[5]["seed"], "--json"]
    assert json.loads(call(monkeypatch, capfdbinary, *alone)[1])["completions"][0]["text"] == rows[5]["text"]
    text = tmp_path / "prompts.txt"
    text.write_text("".join(r["prompt"] + "\n" for r in rows[::2]), "utf-8")
    code, stdout, _ = call(monkeypatch, capfdbinary, *options[:2], "-f", text, *options[4:10], "--json")
    completions = json.loads(stdout)["completions"]
    assert [c["text"] for c in completions] == [r["text"] for r in rows]


def test_an_interrupted_file_is_gone_on_with_and_becomes_what_it_would_have_been(
    checkpoint, prompts_file, tmp_path, monkeypatch, capfdbinary
) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    options = ["-m", checkpoint, "-f", prompts_file, "-n", 9]
    assert call(monkeypatch, capfdbinary, *options, "--out", whole)[0] == 0
    written = 0
    add = ResultFile.add

    def interrupted(self: ResultFile, row: dict) -> None:
        nonlocal written
        add(self, row)
        written += 1
        if written == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "add", interrupted)
        code, _, err = call(monkeypatch, capfdbinary, *options, "--out", part)
    assert code == 130
    assert "3 of 8 rows are written; the same command goes on from there" in err
    with part.open("ab") as file:  # killed in the middle of a row
        file.write('{"index": 5, "sample": 0, "prompt": "이'.encode()[:-1])
    code, stdout, _ = call(monkeypatch, capfdbinary, *options, "--out", part, "--json")
    assert (json.loads(stdout)["rows"], json.loads(stdout)["kept"]) == (8, 3)
    assert part.read_bytes() == whole.read_bytes()
    code, stdout, _ = call(monkeypatch, capfdbinary, *options, "--out", part, "--json")
    assert json.loads(stdout)["kept"] == 8


def test_a_prompt_that_does_not_fit_is_a_row_of_its_own_and_is_tried_again(
    transformer, tokenizer, tmp_path, monkeypatch, capfdbinary
) -> None:
    save_model(transformer, tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    (tmp_path / "prompts.txt").write_text("a\n" + "음악 " * 40 + "\nb\n", "utf-8")
    out = tmp_path / "out.jsonl"
    options = ["-m", tmp_path / "model", "-f", tmp_path / "prompts.txt", "--out", out, "-n", 4]
    code, _, err = call(monkeypatch, capfdbinary, *options, "--past-context", "stop")
    assert code == 1
    assert "1 of 3 texts failed; the first: the prompt has" in err
    assert [("error" in row, row["finish_reason"] == "error") for row in rows_of(out)] == [
        (i == 1, i == 1) for i in range(3)
    ]
    assert call(monkeypatch, capfdbinary, *options)[0] == 0  # reads on past the context
    assert ["error" in row for row in rows_of(out)] == [False] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": 3}\n', 'line 2 must be a JSON object with a string "prompt"'),
        (b'{"prompt": "a"}\n{"prompt"\n', "line 2 is not valid JSON"),
        (b"\n \n", "holds no prompts"),
        (b'"\xff"', "is not UTF-8 at byte 1"),
        (None, "does not exist"),
    ],
)
def test_a_bad_file_of_prompts_is_one_line_and_leaves_no_output(
    checkpoint, tmp_path, monkeypatch, capfdbinary, content: bytes | None, message: str
) -> None:
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_bytes(content)
    code, _, err = call(monkeypatch, capfdbinary, "-m", checkpoint, "-f", path, "--out", tmp_path / "out.jsonl")
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert message in err
    assert not (tmp_path / "out.jsonl").exists()


def test_results_of_something_else_are_not_overwritten(
    checkpoint, prompts_file, tmp_path, monkeypatch, capfdbinary
) -> None:
    out = tmp_path / "out.jsonl"
    options = ["-m", checkpoint, "-f", prompts_file, "-n", 2, "--out", out]
    for content, message in (
        (b"# notes\n", "line 1 is no row of results"),
        (b'{"index": 0, "sample": 0, "prompt": "other", "seed": 0}\n', "line 1 is of another prompt or seed"),
    ):
        out.write_bytes(content)
        code, _, err = call(monkeypatch, capfdbinary, *options)
        assert code == 1
        assert message in err
        assert out.read_bytes() == content
    assert call(monkeypatch, capfdbinary, "-m", checkpoint)[0] == 1
    assert "--stream shows one text" in call(monkeypatch, capfdbinary, *options, "--stream")[2]


def test_text_follows_a_grammar_that_is_asked_for(checkpoint, tmp_path, monkeypatch, capfdbinary) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text('{"enum": ["좋음", "나쁨"]}', "utf-8")
    options = ["-m", checkpoint, "-p", "이 영화는 ", "-n", 40, "--json"]
    code, out, _ = call(monkeypatch, capfdbinary, *options, "--json-schema", tmp_path / "schema.json")
    assert code == 0
    assert json.loads(json.loads(out)["completions"][0]["text"]) in ("좋음", "나쁨")
    code, out, _ = call(monkeypatch, capfdbinary, *options, "--regex", "[가나]{3}")
    assert set(json.loads(out)["completions"][0]["text"]) <= set("가나")
    code, out, err = call(monkeypatch, capfdbinary, *options, "--regex", "(")
    assert (code, out) == (1, b"")
    assert "regex is not valid" in err
