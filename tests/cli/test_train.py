# ruff: noqa: F811 (fixtures that are imported)
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastlm.cli import app as application
from fastlm.training.checkpoint import checkpoint_directories
from fastlm.training.log import read_log
from tests.training.conftest import dataset, text_file  # noqa: F401 (fixtures)

OPTIONS = "--preset tiny --hidden-size 64 --num-layers 1 --context-length 32 --batch-size 4"
SMALL = [*OPTIONS.split(), "--vocab-size", "300"]


@dataclass
class Run:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def fastlm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """The command line, in this process."""

    def call(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["fastlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            application.run()
        out, err = capfd.readouterr()
        return Run(int(caught.value.code or 0), out, err)

    return call


def error_of(run: Run) -> str:
    assert run.returncode == 1, run
    assert run.stdout == ""
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_text_becomes_a_model_and_the_result_is_one_json_object(fastlm, text_file: Path, tmp_path: Path) -> None:
    run = fastlm("train", "--data", text_file, "--out", tmp_path / "run", "--steps", 12, *SMALL, "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["steps"] == 12
    assert 2 < result["bits_per_byte"] < 6
    for name in ("config.json", "model.safetensors", "tokenizer.json", "loss.png", "log.jsonl", "data/manifest.json"):
        assert (tmp_path / "run" / name).is_file()
    again = fastlm("train", "--data", text_file, "--out", tmp_path / "run", "--steps", 12, *SMALL)
    assert "holds a finished run; give another --out, or --overwrite" in error_of(again)


def test_ctrl_c_saves_and_prints_the_command_that_goes_on_to_the_same_end(
    fastlm,
    text_file: Path,
    tmp_path: Path,
) -> None:
    options = ["--data", text_file, "--steps", 60, *SMALL]
    run = tmp_path / "a run"
    command = [sys.executable, "-m", "fastlm", "train", "--out", str(run), *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "log.jsonl").exists() and len(read_log(run / "log.jsonl")) > 5:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert f"go on with: fastlm train --out '{run}' --resume" in stderr
    assert "Traceback" not in stderr
    assert len(checkpoint_directories(run)) == 1
    step = int(checkpoint_directories(run)[0].name.removeprefix("step-"))
    assert 5 <= step < 60

    assert "learning_rate" in error_of(fastlm("train", "--out", run, "--lr", 0.001))
    assert "hidden_size 64, and this command asks for 96" in error_of(
        fastlm("train", "--out", run, "--hidden-size", 96)
    )
    assert "give another --out" in error_of(fastlm("train", "--out", run, "--no-resume", *options))
    other = tmp_path / "other.txt"
    other.write_text("other text\n" * 100)
    assert "other --data" in error_of(fastlm("train", "--out", run, "--data", other))

    resumed = fastlm("train", "--out", run, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    whole = fastlm("train", "--out", tmp_path / "whole", *options, "--json")
    assert json.loads(resumed.stdout)["bits_per_byte"] == json.loads(whole.stdout)["bits_per_byte"]


def test_overwrite_replaces_a_run_but_not_when_the_new_data_is_bad(fastlm, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fastlm("train", "--data", text_file, "--out", run, "--steps", 2, *SMALL).returncode == 0
    before = (run / "model.safetensors").read_bytes()
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"text " * 100 + b"\xff" + b"text " * 100)
    assert "at offset 500" in error_of(fastlm("train", "--data", bad, "--out", run, "--overwrite", *SMALL))
    assert (run / "model.safetensors").read_bytes() == before
    again = fastlm("train", "--data", text_file, "--out", run, "--steps", 3, "--overwrite", *SMALL, "--json")
    assert json.loads(again.stdout)["steps"] == 3


def test_prepared_data_is_trained_on_where_it_lies(fastlm, dataset, tmp_path: Path) -> None:
    options = OPTIONS.split()
    run = fastlm("train", "--data", dataset.directory, "--out", tmp_path / "run", "--steps", 2, *options, "--json")
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "run" / "data").exists()


def bad_inputs(directory: Path, text: Path) -> list[tuple[list[object], str]]:
    empty, latin, folder, corrupt = (directory / n for n in ("empty.txt", "latin.txt", "folder", "corrupt.json"))
    empty.write_bytes(b"")
    latin.write_bytes("caf\xe9 ".encode("latin-1") * 50)
    folder.mkdir()
    corrupt.write_text('{"model": {')
    return [
        (["--data", empty], "empty.txt is empty"),
        (["--data", latin], "is not UTF-8: byte 0xe9 at offset 3"),
        (["--data", folder], "holds no manifest.json"),
        (["--data", directory / "none.txt"], "none.txt does not exist"),
        (["--data", text, "--tokenizer", corrupt], "corrupt.json"),
        (["--data", text, "--tokenizer", directory / "none.json"], "none.json"),
        (["--data", text, "--vocab-size", 256], "256 bytes"),
        (["--data", text, "--vocab-size", 300, "--context-length", 1_000_000], "too few for a context of 1000000"),
        (["--data", text, "--vocab-size", 300, "--hidden-size", 100], "multiple of head_dim"),
        (["--data", text, "--steps", 3, "--minutes", 1], "--minutes or --steps, not both"),
        (["--data", text, "--vocab-size", 300, "--lr", -1], "learning_rate must be a positive number"),
        (["--data", text, "--resume"], "holds no run to go on with"),
        ([], "nothing to train on"),
    ]


@pytest.mark.parametrize("case", range(13))
def test_bad_input_is_one_line_that_says_what_to_do_and_leaves_no_run(
    fastlm,
    case: int,
    text_file: Path,
    tmp_path: Path,
) -> None:
    arguments, message = bad_inputs(tmp_path, text_file)[case]
    assert message in error_of(fastlm("train", "--out", tmp_path / "run", *arguments))
    assert not (tmp_path / "run").exists()


def test_data_that_no_run_owns_is_replaced_only_when_asked(fastlm, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fastlm("train", "--data", text_file, "--out", run, "--steps", 2, *SMALL).returncode == 0
    for file in run.glob("*.json"):
        file.unlink()
    command = ("train", "--data", text_file, "--out", run, "--steps", 2, *SMALL)
    assert "exists already and is no run's" in error_of(fastlm(*command))
    assert (run / "data" / "manifest.json").exists()
    assert fastlm(*command, "--overwrite").returncode == 0


def test_the_disk_filling_up_is_one_line_and_the_text_can_be_trained_on_after(
    fastlm, text_file: Path, tmp_path: Path
) -> None:
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from fastlm.cli import main\nmain()\n"
    )
    arguments = ["train", "--data", str(text_file), "--out", str(tmp_path / "run"), "--steps", "2", *SMALL]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert "File too large" in error_of(Run(run.returncode, run.stdout, run.stderr))
    assert not list(tmp_path.rglob("*.tmp"))
    assert not os.path.exists(tmp_path / "run" / "run.json")
    assert fastlm(*arguments).returncode == 0


def test_several_prepared_directories_are_mixed_by_weight_and_go_on(fastlm, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("다른 글의 문장입니다.\n" * 300, encoding="utf-8")
    assert fastlm("prepare", text_file, "--out", tmp_path / "a", "--vocab-size", 300).returncode == 0
    tokenizer = tmp_path / "a" / "tokenizer.json"
    assert fastlm("prepare", other, "--out", tmp_path / "b", "--tokenizer", tokenizer).returncode == 0
    data = ["--data", tmp_path / "a", "--data", tmp_path / "b"]
    size = OPTIONS.split()
    run = fastlm("train", *data, "--weights", "3,1", "--out", tmp_path / "run", "--steps", 6, *size, "--json")
    assert run.returncode == 0, run.stderr
    assert "--weights '3;1'" in error_of(fastlm("train", *data, "--weights", "3;1", "--out", tmp_path / "c"))
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recorded["weights"] == [3.0, 1.0]
    (tmp_path / "run" / "result.json").unlink()  # as if it had been interrupted before its end
    assert fastlm("train", "--out", tmp_path / "run", "--resume").returncode == 0
    assert fastlm("prepare", other, "--out", tmp_path / "d", "--vocab-size", 280).returncode == 0
    run = fastlm("train", "--data", tmp_path / "a", "--data", tmp_path / "d", "--out", tmp_path / "e", *size)
    assert "made with another tokenizer" in error_of(run)


def test_a_rate_is_suggested_and_no_run_begins(fastlm, text_file: Path, tmp_path: Path) -> None:
    assert fastlm("prepare", text_file, "--out", tmp_path / "data", "--vocab-size", 300).returncode == 0
    run = fastlm(
        "train", "--data", tmp_path / "data", "--out", tmp_path / "run", "--find-lr", *OPTIONS.split(), "--json"
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert 1e-4 < said["lr"] < 4.0
    assert (tmp_path / "run" / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run" / "run.json").exists()


def test_rates_follow_the_width_and_the_optimizer_unless_they_are_given(
    fastlm, text_file: Path, tmp_path: Path
) -> None:
    assert fastlm("prepare", text_file, "--out", tmp_path / "data", "--vocab-size", 300).returncode == 0

    def rates(*options: object) -> tuple[str, float, float]:
        common = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--steps", 1, *OPTIONS.split(), "--overwrite"]
        assert fastlm("train", *common, *options).returncode == 0
        training = json.loads((tmp_path / "run" / "run.json").read_text())["training"]
        return training["optimizer"], training["learning_rate"], training["embedding_learning_rate"]

    assert rates() == ("muon", 0.04, pytest.approx(0.008 * 192 / 64))
    assert rates("--hidden-size", 192) == ("muon", 0.04, pytest.approx(0.008))
    assert rates("--embedding-lr", 0.01, "--lr", 0.03) == ("muon", 0.03, 0.01)
    assert rates("--optimizer", "adamw") == ("adamw", pytest.approx(0.002 * 192 / 64), pytest.approx(0.008 * 192 / 64))
