from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastlm.benchmarks import harness
from fastlm.benchmarks.harness import Case, Ceilings
from typer.testing import CliRunner

from fastlm.cli.app import app
from fastlm.errors import ConfigError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings without measuring, and one small benchmark of three cases, the second of which differs."""

    def cases(device: str) -> Any:
        def check(a: int, b: int) -> None:
            assert a == b, "one is not the other"

        for name, peer_output in (("first", 1), ("second", 2), ("third", 1)):
            peers = {"peer": lambda output=peer_output: output}
            yield Case(name, lambda: 1, peers, check, harness.Bound(bytes=1.0), work=5, unit="tokens")

    monkeypatch.setattr(harness, "measure_ceilings", lambda device: Ceilings(1e10, {torch.float32: 1e11}))
    monkeypatch.setattr(harness, "load", lambda name, device: iter(cases(device)))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_one_mismatch_fails_the_run_and_the_other_cases_are_measured(tmp_path: Path) -> None:
    result = run("rms_norm", "--seconds", "0.01", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"))
    assert result.exit_code == 1
    assert "second: FAILED, ours differs from peer: one is not the other" in result.stdout
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert [r["case"] for r in report["results"]] == ["first", "third"]
    assert [f["case"] for f in report["failures"]] == ["second"]
    assert report["ceilings"] == {"bytes_per_second": 1e10, "flops_per_second": {"float32": 1e11}}
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_results_go_to_stdout_as_one_json_object() -> None:
    report = json.loads(run("rms_norm", "--seconds", "0.01", "--json", "-").stdout)
    assert [r["case"] for r in report["results"]] == ["first", "third"]


def test_list_names_every_benchmark_and_measures_nothing() -> None:
    result = run("--list")
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == harness.available()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "no benchmark named 'nope'"),
        (["rms_norm", "--json", "/no/such/directory/r.json"], "does not exist"),
    ],
)
def test_wrong_names_are_refused_before_measuring(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_gpu_is_refused_where_there_is_none() -> None:
    assert "sees no GPU" in str(run("rms_norm", "--gpu").exception)


def test_threads_are_set_and_recorded(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        run("rms_norm", "--seconds", "0.01", "--threads", "1", "--json", str(tmp_path / "r.json"))
        report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
        assert report["environment"]["threads"] == 1
    finally:
        torch.set_num_threads(before)
