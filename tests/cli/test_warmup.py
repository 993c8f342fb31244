from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastlm.cli import warmup
from fastlm.cli.app import app
from fastlm.errors import ConfigError
from fastlm.model import ModelConfig, Transformer, save_model

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=5, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48,
    context_length=256, qk_norm=True, norm_placement="around", norm_weight_offset=1.0, activation="gelu_tanh",
    sliding_window=8, full_attention_layers=(2, 4), attention_softcap=5.0, logit_softcap=3.0,
)  # fmt: skip


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["warmup", *arguments])


def test_help_has_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "fastlm warmup --model" in result.output


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--model", "anything")
    assert result.exit_code == 1
    assert isinstance(result.exception, ConfigError)
    assert "torch sees no GPU here" in str(result.exception)
    assert "\n" not in str(result.exception)


def test_steps_cover_each_kind_of_layer_once() -> None:
    names = [name for name, _ in warmup.steps(CONFIG, torch.float32, torch.device("cpu"), train=True, speculate=3)]
    assert len(set(names)) == len(names)
    for expected in ("decoding, window 8, 1 at once", "decoding, window 8, 4 at once", "decoding, no window, 1 at once",
                     "prompt of 200 tokens", "draw, top-p", "training step"):  # fmt: skip
        assert expected in names
    assert warmup.few_layers(CONFIG).num_layers == 3
    plain = ModelConfig(64, 32, 7, 2, 1, 16, 48, 256)
    assert warmup.few_layers(plain).num_layers == 1
    names = [name for name, _ in warmup.steps(plain, torch.float32, torch.device("cpu"), train=False, speculate=0)]
    assert [n for n in names if n.startswith("decoding")] == ["decoding, no window, 1 at once"]


@pytest.mark.parametrize("backend", ["", "triton"])
def test_every_step_runs_and_triton_serves_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With triton forced, an op that it does not serve would raise: so these are the kernels that a GPU compiles."""
    monkeypatch.setenv("FASTLM_BACKEND", backend)
    monkeypatch.setattr(warmup, "PROMPT_TOKENS", (1, 18))
    config = ModelConfig(**CONFIG.to_dict() | {"context_length": 24})
    for _, step in warmup.steps(config, torch.float32, torch.device("cpu"), train=True, speculate=1):
        step()


@pytest.mark.gpu
def test_a_second_process_finds_the_kernels_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    save_model(Transformer(ModelConfig(64, 32, 7, 2, 1, 16, 48, 256)), tmp_path / "model")
    result = run("--model", str(tmp_path / "model"), "--dtype", "bfloat16", "--train", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["seconds"] > 0
    assert any((tmp_path / "cache").iterdir())


@pytest.fixture
def tunable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model's path, on a machine whose GPU is played by a stand-in that measures."""
    from fastlm.ops import tuning
    from fastlm.ops.attention import trials

    def measure(shape: trials.Shape, direction: str, backends: dict[str, str], tiles: dict[str, list[int]]) -> Any:
        assert shape == trials.Shape(256, 2, 1, 64, "bfloat16")
        if "gluon" in backends.values():
            return trials.Outcome(None, "needs compute capability 9.0 (Hopper), not 8.0")
        return trials.Outcome(2.0 if tiles else 3.0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Test 1")
    monkeypatch.setattr(tuning, "chip", lambda _: {"device": "NVIDIA Test 1", "triton": "3.7.1", "fastlm": "0"})
    monkeypatch.setattr(trials, "measure", measure)
    monkeypatch.setattr(warmup, "steps", lambda *_, **__: iter(()))
    save_model(Transformer(ModelConfig(64, 32, 1, 2, 1, 64, 48, 256)), tmp_path / "model")
    return str(tmp_path / "model")


def test_tune_records_what_is_right_and_fastest(tunable: str, tmp_path: Path) -> None:
    result = run("--model", tunable, "--dtype", "bfloat16", "--tune", "--train", "--json")
    assert result.exit_code == 0, result.output
    tuned = json.loads(result.stdout)["tuned"]
    assert tuned["backends"] == {"attention forward 64 causal": "triton", "attention backward 64 causal": "triton"}
    assert set(tuned["tiles"]) == {"forward 64 16-bit"}  # the stand-in finds any other tiles as fast
    assert tuned["outcomes"]["forward, gluon"]["problem"].startswith("needs compute capability 9.0")
    record = json.loads((tmp_path / "cache" / "fastlm" / "tuned" / "nvidia-test-1-3.7.1.json").read_text())
    assert str(tmp_path / "cache") in tuned["record"]
    assert record["tiles"] == tuned["tiles"]


def test_tune_prints_a_line_for_each_candidate_and_the_place_of_the_record(tunable: str) -> None:
    result = run("--model", tunable, "--dtype", "bfloat16", "--tune")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert any(line.startswith("forward, triton ") and line.endswith("3.000 ms") for line in lines)
    assert any(line.startswith("forward, gluon ") and "needs compute capability 9.0" in line for line in lines)
    assert not any(line.startswith("backward") for line in lines)
    assert any(line.startswith("recorded in ") for line in lines)


def test_fp32_has_nothing_to_tune(tunable: str) -> None:
    result = run("--model", tunable, "--dtype", "float32", "--tune")
    assert result.exit_code == 1
    assert "add --dtype bfloat16" in str(result.exception)
