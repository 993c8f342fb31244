from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastlm.cli.app import app
from fastlm.errors import ConfigError, DataError
from fastlm.model import ModelConfig
from fastlm.training import TrainingConfig, prepare, train
from tests.training.conftest import one_thread  # noqa: F401 (fixture)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    (directory / "text.txt").write_text("".join(f"line {i} of the text\n" for i in range(800)))
    dataset = prepare([directory / "text.txt"], directory / "data", vocab_size=300)
    model = ModelConfig(
        vocab_size=300, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, intermediate_size=16,
        context_length=32,
    )  # fmt: skip
    for name, rate in (("slow", 0.0001), ("fast", 0.04)):
        config = TrainingConfig(
            steps=12, batch_size=4, warmup_steps=1, learning_rate=rate, embedding_learning_rate=rate
        )
        train(model, config, dataset, directory / "experiments" / name)
    return directory


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_best_run_comes_first_with_the_options_that_differ(runs: Path, tmp_path: Path) -> None:
    said = json.loads(call("runs", runs / "experiments", "--plot", tmp_path / "runs.png", "--json"))
    first, second = said["runs"]
    assert [Path(row["run"]).name for row in (first, second)] == ["fast", "slow"]
    assert first["loss"] < second["loss"]
    assert first["options"] == {"embedding_learning_rate": 0.04, "learning_rate": 0.04}
    assert first["finished"]
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    table = call("runs", runs / "experiments" / "fast", runs / "experiments" / "slow")
    assert "learning" in table
    assert "0.04" in table
    with pytest.raises(DataError, match="holds no run"):
        call("runs", tmp_path)


def test_options_come_from_a_file_and_those_of_the_command_line_go_first(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "run.yaml").write_text(
        f"data: {runs / 'data'}\nout: {tmp_path / 'run'}\nsteps: 3\nhidden_size: 64\nnum-layers: 1\ndtype: float32\n"
        "batch-size: 2\ncontext-length: 32\n"
    )
    said = json.loads(call("train", "--config", tmp_path / "run.yaml", "--steps", 2, "--json"))
    assert said["steps"] == 2
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (recorded["model"]["hidden_size"], recorded["training"]["batch_size"]) == (64, 2)
    for content, message in (("stepz: 3", "train has no option stepz"), ("[1]", "holds no options"), ("a: [", "a: ")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            call("train", "--config", tmp_path / "bad.yaml", "--out", tmp_path / "x")
