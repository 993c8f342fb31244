from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastlm.cli import demo
from fastlm.cli.app import app
from fastlm.data import english_text, korean_text
from fastlm.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "OP_BENCHMARKS", ("rms_norm",))
    monkeypatch.setattr(demo, "CASES_PER_OP", 1)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["demo", *arguments])


def test_demo_leaves_a_model_a_loss_curve_and_samples_at_three_temperatures(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run("--seconds", "4", "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "model.safetensors").stat().st_size > 100_000
    assert [s["temperature"] for s in summary["samples"]] == [0.2, 0.2, 0.8, 0.8, 1.4, 1.4]
    assert all(s["text"] and "\ufffd" not in s["text"] for s in summary["samples"])
    assert summary["training"]["steps"] > 0
    assert summary["training"]["bits_per_byte"] < 8
    assert [(op["benchmark"], op["peer"]) for op in summary["ops"]] == [("rms_norm", "torch")]

    again = run("--seconds", "3", "--out", str(out), "--lang", "ko")
    assert again.exit_code == 0, again.output
    assert "학습" in again.stdout
    assert "Training" not in again.stdout
    assert "강가의 작은 마을에" in again.stdout
    assert not (out / "text" / "english.txt").exists()


def test_directory_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    result = run("--out", str(tmp_path))
    assert isinstance(result.exception, ConfigError)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert isinstance(run("--out", str(tmp_path / "thesis.txt")).exception, ConfigError)


def test_interrupt_while_training_exits_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlm.training.train", interrupted)
    assert run("--lang", "ko", "--out", str(tmp_path / "demo")).exit_code == 130


def test_embedded_texts_are_there_and_well_formed() -> None:
    english, korean = english_text(), korean_text()
    assert len(english) > 300_000
    assert "for_stmt" in english
    assert 15_000 <= len(korean.encode()) <= 40_000
    assert unicodedata.is_normalized("NFC", korean)
    assert korean.count("\n\n") >= 40
    hangul = sum("가" <= char <= "힣" for char in korean)
    assert hangul > 0.6 * len(korean)


def test_python_without_its_documentation_is_told_or_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert english_text() == ""
    assert isinstance(run("--lang", "en", "--out", str(tmp_path / "a")).exception, DataError)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise DataError("far enough")

    monkeypatch.setattr("fastlm.training.prepare", stop)
    assert str(run("--out", str(tmp_path / "b")).exception) == "far enough"
    assert [path.name for path in (tmp_path / "b" / "text").iterdir()] == ["korean.txt"]
