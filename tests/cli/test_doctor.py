from __future__ import annotations

import json
import platform
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastlm
from fastlm import _core
from fastlm.cli import doctor
from fastlm.cli.app import app
from fastlm.errors import NativeCoreError
from fastlm.ops import OPS


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_report_names_this_machine_and_every_op() -> None:
    result = run("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["usable"] is True
    assert report["machine"]["python"] == platform.python_version()
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["native_core"] == "built"
    assert set(report["ops"]) == set(OPS)


@pytest.mark.parametrize("name", sorted(OPS))
def test_backend_shown_is_the_one_that_explain_gives_and_that_runs(name: str) -> None:
    args, kwargs = doctor.typical_call(name, torch.device("cpu"))
    shown = doctor.backends()[name]["cpu"]
    assert shown["backend"] == fastlm.explain(name, *args, **kwargs).chosen
    assert set(shown["not"]) | {shown["backend"]} == set(OPS[name].backends)
    OPS[name].public(*args, **kwargs)


def test_gpu_tensors_would_use_triton_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLM_BACKEND", "")
    for name, answer in doctor.backends().items():
        if "triton" in OPS[name].backends:
            assert answer["cuda"]["backend"] in ("triton", "gluon", "cuda"), (name, answer)


def test_text_fits_a_narrow_terminal_and_ends_with_the_verdict() -> None:
    result = run()
    assert result.exit_code == 0
    assert "usable here" in result.stdout.splitlines()[-1]
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_missing_native_core_exits_1_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NativeCoreError("fastlm's native core is not available (no file)")

    monkeypatch.setattr(_core, "native", missing)
    monkeypatch.setattr("shutil.which", lambda name: None)
    result = run()
    assert result.exit_code == 1
    assert "problem: no native core" in result.stdout
    assert "install a C++20 compiler" in result.stdout
    report = json.loads(run("--json").stdout)
    assert report["usable"] is False
    assert report["machine"]["cpu_features"] == []


def test_gpu_without_triton_is_a_problem() -> None:
    facts = {"native_core": "built", "compiler": None, "gpus": [{"name": "x"}], "triton": None}
    assert "pip install triton" in doctor.find_problems(facts)[0]
