from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fastlm.errors import CheckpointError, ConfigError
from fastlm.model import ModelConfig
from fastlm.training import TokenDataset, TrainingConfig, train
from fastlm.training.checkpoint import checkpoint_directories
from fastlm.training.log import read_log
from fastlm.training.run_directory import delete_run

EVERY_STEP = TrainingConfig(steps=14, batch_size=4, warmup_steps=2, checkpoint_seconds=0)

TRAIN_IN_A_PROCESS = """
import json, sys
from fastlm.model import ModelConfig
from fastlm.training import TokenDataset, TrainingConfig, train
model, config, data, out = json.loads(sys.argv[1])
train(ModelConfig(**model), TrainingConfig(**config), TokenDataset(data), out)
"""


def losses(run: Path) -> dict[int, float]:
    lines = [line for line in read_log(run / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line["loss"] for line in lines}


def after(steps: int) -> Callable[[], bool]:
    calls = {"n": 0}

    def stop() -> bool:
        calls["n"] += 1
        return calls["n"] >= steps

    return stop


def start(tiny: ModelConfig, config: TrainingConfig, dataset: TokenDataset, out: Path) -> subprocess.Popen[bytes]:
    arguments = json.dumps([asdict(tiny), asdict(config), str(dataset.directory), str(out)])
    return subprocess.Popen([sys.executable, "-c", TRAIN_IN_A_PROCESS, arguments], stderr=subprocess.PIPE)


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        directories = checkpoint_directories(run)
        if directories and int(directories[-1].name.removeprefix("step-")) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint of step {step}; {process.stderr.read() if process.stderr else b''!r}")


def test_a_run_killed_twice_ends_with_the_losses_and_weights_of_one_that_was_not(
    dataset: TokenDataset, tiny: ModelConfig, tmp_path: Path
) -> None:
    config = replace(EVERY_STEP, steps=30)
    whole = start(tiny, config, dataset, tmp_path / "whole")
    assert whole.wait(120) == 0
    for step in (5, 15):
        process = start(tiny, config, dataset, tmp_path / "killed")
        wait_for_step(process, tmp_path / "killed", step)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        assert not (tmp_path / "killed" / "result.json").exists()
    assert start(tiny, config, dataset, tmp_path / "killed").wait(120) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "killed")) == 30
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["bits_per_byte"] == results[1]["bits_per_byte"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_stopped_at_any_step_goes_on_exactly(dataset, tiny, tmp_path: Path, dtype: str) -> None:
    config = replace(EVERY_STEP, checkpoint_seconds=1000, dtype=dtype)
    train(tiny, config, dataset, tmp_path / "whole")
    for steps in (1, 4, 7, 1):
        result = train(tiny, config, dataset, tmp_path / "stopped", should_stop=after(steps))
        assert result.interrupted
        assert result.bits_per_byte is None
    assert result.steps == 13
    train(tiny, config, dataset, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_run_limited_by_time_that_is_stopped_equals_an_uninterrupted_one_of_its_steps(
    dataset, tiny, tmp_path
) -> None:
    config = replace(EVERY_STEP, steps=None, minutes=0.05)
    assert train(tiny, config, dataset, tmp_path / "timed", should_stop=after(3)).interrupted
    assert train(tiny, config, dataset, tmp_path / "timed", should_stop=after(4)).interrupted
    result = train(tiny, config, dataset, tmp_path / "timed")
    train(tiny, replace(EVERY_STEP, steps=result.steps), dataset, tmp_path / "counted")
    assert result.steps > 7
    assert losses(tmp_path / "timed") == losses(tmp_path / "counted")


def test_another_option_is_refused_by_name_and_a_finished_run_is_not_touched(dataset, tiny, tmp_path: Path) -> None:
    train(tiny, EVERY_STEP, dataset, tmp_path, should_stop=after(2))
    with pytest.raises(ConfigError, match=r"unfinished run with learning_rate 0\.04, and this command asks for 0\.01"):
        train(tiny, replace(EVERY_STEP, learning_rate=0.01), dataset, tmp_path)
    with pytest.raises(ConfigError, match="num_layers 2, and this command asks for 3"):
        train(replace(tiny, num_layers=3), EVERY_STEP, dataset, tmp_path)
    train(tiny, EVERY_STEP, dataset, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="holds a finished run"):
        train(tiny, EVERY_STEP, dataset, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def stopped_run(dataset: TokenDataset, tiny: ModelConfig, out: Path) -> list[Path]:
    train(tiny, EVERY_STEP, dataset, out, should_stop=after(4))
    directories = checkpoint_directories(out)
    assert [d.name for d in directories] == ["step-00000003", "step-00000004"]
    return directories


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("how", ["truncate", "flip", "delete"])
def test_a_damaged_checkpoint_is_refused_and_the_earlier_one_is_named_and_works(
    dataset, tiny, tmp_path: Path, name: str, how: str
) -> None:
    earlier, last = stopped_run(dataset, tiny, tmp_path)
    data = bytearray((last / name).read_bytes())
    (last / name).unlink()  # the run's own model is the same file under another name
    if how == "truncate":
        (last / name).write_bytes(data[: len(data) // 2])
    elif how == "flip":
        data[len(data) // 2] ^= 0x81
        (last / name).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        train(tiny, EVERY_STEP, dataset, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{last} is damaged")
    assert f"{earlier} is intact: delete the damaged directory" in message
    assert "\n" not in message
    shutil.rmtree(last)
    assert train(tiny, EVERY_STEP, dataset, tmp_path).steps == 14
    assert len(losses(tmp_path)) == 14


def test_when_no_checkpoint_is_intact_the_message_says_so(dataset, tiny, tmp_path: Path) -> None:
    for directory in stopped_run(dataset, tiny, tmp_path):
        (directory / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no earlier checkpoint is intact: use --overwrite"):
        train(tiny, EVERY_STEP, dataset, tmp_path)


def test_leftovers_of_a_checkpoint_cut_off_by_a_crash_do_not_count(dataset, tiny, tmp_path: Path) -> None:
    stopped_run(dataset, tiny, tmp_path)
    partial = tmp_path / "checkpoints" / ".step-00000005.123.tmp"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert train(tiny, EVERY_STEP, dataset, tmp_path).steps == 14
    assert not partial.exists()


def test_a_full_disk_stops_with_one_line_and_the_earlier_checkpoint_goes_on(dataset, tiny, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the full disk: both fail inside a write."""
    config = replace(EVERY_STEP, checkpoint_seconds=1000)
    train(tiny, config, dataset, tmp_path, should_stop=after(3))
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n" + TRAIN_IN_A_PROCESS
    )
    arguments = json.dumps([asdict(tiny), asdict(config), str(dataset.directory), str(tmp_path)])
    run = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    last_line = run.stderr.strip().splitlines()[-1]
    assert "CheckpointError: could not write the checkpoint" in last_line or "could not write" in last_line
    assert [d.name for d in checkpoint_directories(tmp_path)] == ["step-00000003"]
    assert train(tiny, config, dataset, tmp_path).steps == 14
    assert len(losses(tmp_path)) == 14


def test_a_disk_that_is_full_when_the_best_model_is_saved_loses_nothing(dataset, tiny, tmp_path, monkeypatch) -> None:
    config = replace(EVERY_STEP, keep_best=2)
    train(tiny, config, dataset, tmp_path / "whole")
    from fastlm.training import checkpoint

    write_model = checkpoint._write_model

    def full(directory: Path, *rest: object) -> None:
        if directory.name.startswith(".best") and checkpoint_directories(tmp_path / "run"):
            (directory / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_model(directory, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_write_model", full)
        with pytest.raises(CheckpointError, match=r"could not write .*/checkpoints/best: No space left on device"):
            train(tiny, config, dataset, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    train(tiny, config, dataset, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    names = [sorted(p.name for p in (tmp_path / run / "checkpoints").iterdir()) for run in ("whole", "run")]
    assert names[0] == names[1]
    for name in names[0]:
        files = [(tmp_path / run / "checkpoints" / name / "model.safetensors").read_bytes() for run in ("whole", "run")]
        assert files[0] == files[1], name


def test_deleting_a_run_leaves_every_other_file(dataset, tiny, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    delete_run(tmp_path)
    stopped_run(dataset, tiny, tmp_path)
    delete_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "notes.txt"]
    assert os.listdir(tmp_path / "data") == ["mine.txt"]
