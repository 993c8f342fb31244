"""Several processes under torchrun, over gloo on the CPU, beside one process at the same global batch.

Tolerance: a loss of the same weights differs by rounding, 1e-6 of it. Over steps, Muon multiplies in bf16, so that a
gradient's last bit can move a step; six steps stay within 1e-3.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastlm.training import TokenDataset, train
from fastlm.training.checkpoint import checkpoint_directories
from fastlm.training.log import read_log
from fastlm.training.run_directory import read_run

STEPS = 6
OPTIONS = [
    "--steps", str(STEPS), "--hidden-size", "64", "--num-layers", "2", "--context-length", "32", "--batch-size", "8",
    "--dtype", "float32",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(processes: int, *arguments: object, restarts: int = 0) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}", "-m", "fastlm", "train",
        *map(str, arguments),
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, err
    return out, err


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line]


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def by_one_process(run: Path, dataset: TokenDataset, out: Path) -> Path:
    """The same run, all of it or what is left, in this process."""
    description = read_run(run)
    assert description is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(description.model, description.training, dataset, out)
    finally:
        torch.set_num_threads(threads)
    return out


def same(run: Path, one: Path) -> None:
    assert len(losses(run)) == STEPS
    assert losses(run)[0] == pytest.approx(losses(one)[0], rel=1e-6)
    assert losses(run) == pytest.approx(losses(one), rel=1e-3)
    assert result(run)["bits_per_byte"] == pytest.approx(result(one)["bits_per_byte"], rel=1e-3)
    norms = [[line["gradient_norm"] for line in read_log(r / "log.jsonl") if "loss" in line] for r in (run, one)]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-5)


def check_parallel(processes: int, parallel: str, dataset: TokenDataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--data", dataset.directory, "--out", run, *OPTIONS, "--parallel", parallel, "--accumulation", 2]
    out, _ = finish(torchrun(processes, *options, "--json"))
    assert json.loads(out)["steps"] == STEPS  # said once, by the first process
    same(run, by_one_process(run, dataset, tmp_path / "one"))
    assert json.loads((checkpoint_directories(run)[-1] / "state.json").read_text())["state"]["step"] == STEPS
    (run / "result.json").unlink()  # as if the job had ended before its last evaluation
    many = losses(run)
    by_one_process(run, dataset, run)  # goes on from the checkpoint of the others
    assert losses(run) == many
    same(run, tmp_path / "one")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one_and_one_goes_on_from_their_checkpoint(dataset, tmp_path, parallel: str) -> None:
    check_parallel(2, parallel, dataset, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_four_processes_train_as_one_and_one_goes_on_from_their_checkpoint(dataset, tmp_path, parallel: str) -> None:
    check_parallel(4, parallel, dataset, tmp_path)


def test_a_killed_process_ends_the_job_and_the_next_goes_on(dataset: TokenDataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = torchrun(2, "--data", dataset.directory, "--out", run, *OPTIONS[2:], "--steps", 100_000)
    os.kill(wait_for_worker(process, run), signal.SIGKILL)
    _, err = finish(process, code=1)
    assert "Signal 9 (SIGKILL) received" in err  # torchrun's own account
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert all("lost another process of this job; the last checkpoint is whole" in line for line in lines)
    assert not (run / "result.json").exists()


@pytest.mark.slow
def test_torchrun_restarts_a_job_whose_process_was_killed_and_it_goes_on(dataset: TokenDataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--data", dataset.directory, "--out", run, *OPTIONS[2:], "--steps", 3000]
    process = torchrun(2, *options, restarts=1)
    worker = wait_for_worker(process, run)
    while not checkpoint_directories(run) and process.poll() is None:
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    finish(process)
    assert result(run)["steps"] == 3000
    steps = [line["step"] for line in read_log(run / "log.jsonl") if "loss" in line]
    assert steps == list(range(1, 3001))


def wait_for_worker(process: subprocess.Popen[str], run: Path) -> int:
    """The id of the second worker, once the run has begun to take steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "log.jsonl").exists() and len(losses(run)) > 2:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    return int(child)
        time.sleep(0.05)
    raise AssertionError("the run took no step")
