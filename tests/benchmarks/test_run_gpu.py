"""`benchmarks/run_gpu.sh`, whose GPU is played by a stand-in for the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "run_gpu.sh"
STAND_IN = """#!/usr/bin/env bash
case "$*" in
    -c*) echo "NVIDIA Test 1" | tr 'A-Z ' 'a-z-' ;;
    *"-m pytest"*) {pytest} ;;
    *"-m fastlm bench"*) {bench} ;;
    *) exit 0 ;;
esac
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a bash script")


def run(*arguments: str, python: str = sys.executable, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python, "CUDA_VISIBLE_DEVICES": "", "PATH": path or "/usr/bin:/bin"}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def stand_in(tmp_path: Path, *, pytest: str = "exit 0", bench: str = "exit 0") -> str:
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(pytest=pytest, bench=bench))
    path.chmod(0o755)
    return str(path)


def test_help_and_wrong_usage():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    shown = run("--help")
    assert shown.returncode == 0
    assert "Exit code: 0 all passed" in shown.stdout
    for wrong in (["--fast"], ["--minutes"], ["--minutes", "0"], ["--minutes", "ten"]):
        refused = run(*wrong)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1


def test_without_a_gpu_one_line_says_so(tmp_path):
    refused = run("--out", str(tmp_path / "results"))
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("no GPU: ")
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_a_dry_run_names_the_steps_within_the_time_and_runs_none(tmp_path):
    shown = run("--dry-run", "--minutes", "5", "--out", str(tmp_path / "results"))
    assert shown.returncode == 0
    limits = [int(line.split("at most")[1].split()[0]) for line in shown.stdout.splitlines()]
    assert len(limits) >= 2
    assert sum(limits) <= 300
    assert not (tmp_path / "results").exists()


def test_all_steps_pass_and_the_device_names_the_results(tmp_path):
    bench = 'for a in "$@"; do [ "$last" = --json ] && echo "{}" >"$a"; last=$a; done'
    done = run("--out", str(tmp_path), python=stand_in(tmp_path, pytest="exit 5", bench=bench))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all steps passed" in done.stdout
    assert (tmp_path / "nvidia-test-1.json").read_text() == "{}\n"


def test_a_step_that_fails_does_not_stop_the_next(tmp_path):
    python = stand_in(tmp_path, pytest="echo 'FAILED tests/x.py::test_y'; exit 1", bench=f"touch {tmp_path}/benched")
    done = run("--out", str(tmp_path), python=python)
    assert done.returncode == 1
    assert "FAILED tests/x.py::test_y" in done.stdout
    assert "failed: tests" in done.stdout
    assert (tmp_path / "benched").exists()


@pytest.mark.slow
def test_a_step_that_hangs_is_ended(tmp_path):
    start = time.monotonic()
    done = run("--minutes", "1", "--out", str(tmp_path), python=stand_in(tmp_path, bench="exec sleep 100"))
    assert done.returncode == 1
    assert "bench: FAILED (time out)" in done.stdout
    assert time.monotonic() - start < 60
