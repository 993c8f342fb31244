from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import fastlm

HIDE = """
import sys

for name in ("triton", "fastlm._native", "fastlm._cuda"):
    sys.modules[name] = None  # importing it now fails as if it were not installed
"""
HEAVY = ("triton", "transformers", "tokenizers", "matplotlib", "typer", "rich", "fastlm._native", "fastlm._cuda")


def python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_brings_no_heavy_module() -> None:
    loaded = python(f"import sys, fastlm; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_import_needs_no_triton_compiler_native_core_or_gpu(tmp_path: Path) -> None:
    code = HIDE + (
        "import fastlm, torch, json\n"
        "x = torch.randn(3, 8)\n"
        "y = fastlm.ops.rms_norm(x, torch.ones(8))\n"
        "error = (y - torch.nn.functional.rms_norm(x, (8,), eps=1e-6)).abs().max().item()\n"
        "e = fastlm.explain('rms_norm', x, torch.ones(8))\n"
        "print(json.dumps([error, e.chosen, e.reasons, fastlm.nn.__name__]))"
    )
    environment = {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "CXX": "", "TRITON_INTERPRET": "0"}
    error, chosen, reasons, nn = json.loads(python(code, **environment))
    assert error < 1e-5
    assert chosen == "reference"
    assert "pip install triton" in reasons["triton"]
    assert nn == "fastlm.nn"


def test_tokenizer_without_native_core_says_how_to_get_it() -> None:
    code = HIDE + (
        "import fastlm\n"
        "try:\n"
        "    fastlm.BpeTrainer(vocab_size=300).train_from_iterator(['ab'])\n"
        "except fastlm.errors.NativeCoreError as error:\n"
        "    print(error)\n"
    )
    assert "C++20 compiler" in python(code)


def test_every_public_name_resolves_and_nothing_else_does() -> None:
    for name in fastlm.__all__:
        assert getattr(fastlm, name) is not None
    assert set(fastlm.__all__) <= set(dir(fastlm))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastlm.nonsense  # noqa: B018


def test_import_adds_at_most_300_ms_to_torch() -> None:
    clock = "import time; start = time.perf_counter(); import torch{}; print(time.perf_counter() - start)"
    torch_alone, with_fastlm = [], []
    for _ in range(3):
        torch_alone.append(float(python(clock.format(""))))
        with_fastlm.append(float(python(clock.format(", fastlm"))))
    added = statistics.median(with_fastlm) - statistics.median(torch_alone)
    assert added <= 0.3, f"import fastlm adds {added:.3f} s to torch's {statistics.median(torch_alone):.3f} s"
