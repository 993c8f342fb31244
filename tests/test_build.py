"""The build as a user meets it: without a compiler, and with a CUDA compiler on a machine without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "o"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def test_no_compiler_is_one_clear_message(tmp_path: Path) -> None:
    run = build(tmp_path, PATH=str(tmp_path), CXX="")
    assert run.returncode != 0
    assert "fastlm: no C++ compiler found" in run.stderr
    assert "apt install g++" in run.stderr
    assert "FASTLM_NO_NATIVE=1" in run.stderr
    assert "Traceback" not in run.stderr


def test_no_nvcc_is_one_clear_message(tmp_path: Path) -> None:
    run = build(tmp_path, PATH=str(tmp_path), CXX=shutil.which("true") or "", FASTLM_CUDA="1", CUDA_HOME=str(tmp_path))
    assert run.returncode != 0
    assert "FASTLM_CUDA=1 but nvcc is neither on PATH nor in" in run.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda_core_builds_without_spills_and_loads_without_a_gpu(tmp_path: Path) -> None:
    run = build(tmp_path, FASTLM_CUDA="1")
    assert run.returncode == 0, run.stderr[-2000:]
    spills = [line for line in (run.stdout + run.stderr).splitlines() if "bytes spill stores" in line]
    assert spills
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
    code = (
        "import glob, importlib.util as u, sys\n"
        "spec = u.spec_from_file_location('_cuda', glob.glob(sys.argv[1] + '/fastlm/_cuda*')[0])\n"
        "module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.runtime_version)\n"
        "try:\n"
        "    module.sample('float32', 0, 1, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    load = subprocess.run([sys.executable, "-c", code, tmp_path / "lib"], capture_output=True, text=True)
    assert load.returncode == 0, load.stderr
    version, message = load.stdout.splitlines()
    assert int(version) >= 12000
    assert message == "logits has no storage"
