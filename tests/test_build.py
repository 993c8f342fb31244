"""The build as a user meets it: without a compiler, and with a CUDA compiler on a machine without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.ops.sampling import reference

ROOT = Path(__file__).resolve().parents[1]


def build(tmp_path: Path, script: tuple[str, ...] = ("setup.py",), **environment: str) -> Any:
    command = [sys.executable, *script, "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "o"]
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


CUDA_CORE_ALONE = """
import runpy, setuptools

setup = setuptools.setup
setuptools.setup = lambda ext_modules, **options: setup(ext_modules=ext_modules[1:], **options)
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda_core_builds_without_spills_and_loads_without_a_gpu(tmp_path: Path) -> None:
    run = build(tmp_path, ("-c", CUDA_CORE_ALONE), FASTLM_CUDA="1", FASTLM_CUDA_ARCHS="80;90")
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
        "print(module.archs)\n"
        "print(module.uniform(-(2**62) - 5, 2**40 + 3).hex())\n"
        "try:\n"
        "    module.sample('float32', 0, 1, 4, 4, 0, 0, 0, 0, False, 0, 0, 0, 0, 0, 0, 0)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    load = subprocess.run([sys.executable, "-c", code, tmp_path / "lib"], capture_output=True, text=True)
    assert load.returncode == 0, load.stderr
    version, archs, uniform, message = load.stdout.splitlines()
    assert int(version) >= 12000
    assert archs == "[80, 90]"
    assert float.fromhex(uniform) == reference.uniform(torch.tensor(-(2**62) - 5), torch.tensor(2**40 + 3)).item()
    assert message == "logits has no storage"
