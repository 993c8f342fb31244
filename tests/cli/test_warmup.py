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
