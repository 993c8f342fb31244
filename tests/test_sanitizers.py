"""The native core under AddressSanitizer and UndefinedBehaviorSanitizer: its tests run on a copy built with both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sanitize

ROOT = Path(__file__).resolve().parents[1]
# vptr needs the classes of pybind11 and the standard library to be checked too.
FLAGS = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
TESTS = {
    "tokenizer": ["tests/tokenizer", "tests/cli/test_train_tokenizer.py"],
    "kernels": [
        *("tests/ops/test_sampling_cpu.py", "tests/ops/test_parallel_cpu.py", "tests/ops/test_rms_norm.py"),
        *("tests/ops/test_swiglu.py", "tests/ops/test_rotary.py", "tests/ops/test_decode_attention.py"),
        *("tests/ops/test_quantized_linear.py", "tests/ops/test_linear_cross_entropy.py"),
        "tests/ops/test_attention_cpu.py",
        "tests/inference/test_native_decoder.py",
    ],
}


def library(name: str) -> str:
    """The path of a runtime library of g++; skips where there is none."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not there")
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ has no {name}")
    return path


@pytest.fixture(scope="module")
def checked_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout with a native core that checks itself."""
    library("libasan.so")
    folder = tmp_path_factory.mktemp("sanitized") / "fastlm"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__"))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    build = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": f"g++ {FLAGS}", "FASTLM_CUDA": ""},
    )
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-3000:]
    return folder


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("group", TESTS)
def test_sanitizers_find_nothing(checked_copy: Path, group: str) -> None:
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",  # before what Python loads
        # The interpreter frees little at its end. Sizes beyond memory must fail as they do without the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",  # so that Python's own objects are checked, too
        "PYTHONPATH": str(checked_copy),
        "FASTLM_TEST_DATA": str(ROOT / ".test-data"),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "--timeout=1800",
        *TESTS[group],
    ]
    run = subprocess.run(command, cwd=checked_copy, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    report = run.stdout + run.stderr
    assert "AddressSanitizer" not in report
    assert "runtime error" not in report


def test_the_copy_is_checked(checked_copy: Path) -> None:
    """Else the tests above could not fail: the core that they load calls both sanitizers."""
    core = next((checked_copy / "fastlm").glob("_native*.so"))
    symbols = subprocess.run(["nm", "-D", "--undefined-only", core], capture_output=True, text=True, check=True).stdout
    assert "__asan_report_load1" in symbols
    assert "__ubsan_handle_" in symbols
