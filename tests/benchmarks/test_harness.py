from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastlm.benchmarks import bench_training, harness
from fastlm.benchmarks.harness import Bound, Case, Ceilings, Failure, Result

from fastlm.errors import ConfigError

CEILINGS = Ceilings(1e9, {torch.float32: 1e9, torch.bfloat16: 4e9})


def sleeper(seconds: float, output: int = 1):
    def function() -> int:
        time.sleep(seconds)
        return output

    return function


def equal(a: int, b: int) -> None:
    assert a == b, f"{a} is not {b}"


def install(monkeypatch: pytest.MonkeyPatch, cases: Iterator[Case]) -> None:
    monkeypatch.setattr(harness, "load", lambda name, device: cases)


def test_ratio_is_the_peers_time_over_ours() -> None:
    case = Case("c", sleeper(0.005), {"slow": sleeper(0.020)}, equal, Bound(bytes=1e6), work=100, unit="tokens")
    (result,) = harness.run_case("b", case, "cpu", CEILINGS, seconds=0.1)
    assert 2.5 < result.ratio < 4.5
    assert result.bound_seconds == pytest.approx(1e-3)
    assert result.share_of_bound == pytest.approx(1e-3 / result.ours_seconds)
    assert result.rate == pytest.approx(100 / result.ours_seconds)


def test_bound_is_the_slower_of_memory_and_arithmetic_at_the_given_dtype() -> None:
    assert CEILINGS.seconds(Bound(bytes=1e9, flops=2e9)) == pytest.approx(2)
    assert CEILINGS.seconds(Bound(bytes=1e9, flops=2e9, dtype=torch.bfloat16)) == pytest.approx(1)


def test_memory_is_our_peak_beside_the_peers_where_it_is_measured() -> None:
    peaks = {"ours": 30.0, "peer": 120.0, "unknown": None}
    peers = {"peer": sleeper(0), "unknown": sleeper(0)}
    results = harness.run_case("b", Case("c", sleeper(0), peers, equal, peak=peaks.get), "cpu", CEILINGS, 0.01)
    assert [result.memory_ratio for result in results] == [0.25, None]
    (without,) = harness.run_case("b", Case("c", sleeper(0), {"peer": sleeper(0)}, equal), "cpu", CEILINGS, 0.01)
    assert without.memory_ratio is None


def test_the_peak_of_training_holds_what_the_step_and_its_optimizer_must() -> None:
    size = bench_training.Size("small", 64, 1, 4096, 64, 64)
    ours, plain = (bench_training.peak_of_training(size, "float32", "cpu", side) for side in ("ours", "torch"))
    assert ours is not None
    assert plain is not None
    parameters = sum(p.numel() for p in bench_training.new_model(size, "cpu").parameters())
    logits = 64 * 64 * 4096
    assert 4 * 2 * parameters < ours < 4 * logits  # Adam's two averages; never all logits
    assert plain > 4 * logits


def test_different_outputs_fail_without_a_timing_and_the_rest_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def wrong() -> int:
        calls.append(1)
        return 2

    def raising() -> int:
        raise RuntimeError("boom")

    good = Case("good", sleeper(0), {"peer": sleeper(0)}, equal)
    cases = [Case("wrong", sleeper(0), {"peer": wrong}, equal), Case("raises", raising, {"peer": wrong}, equal), good]
    install(monkeypatch, iter(cases))
    outcomes = list(harness.run("b", "cpu", CEILINGS, seconds=0.01))
    assert [type(outcome) for outcome in outcomes] == [Failure, Failure, Result]
    assert outcomes[0].reason == "ours differs from peer: 1 is not 2" or "1 is not 2" in outcomes[0].reason
    assert outcomes[1].reason == "RuntimeError: boom"
    assert len(calls) == 1  # compared once, never timed


def test_inputs_that_cannot_be_made_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases() -> Iterator[Case]:
        yield Case("good", sleeper(0), {"peer": sleeper(0)}, equal)
        raise MemoryError("too large")

    install(monkeypatch, cases())
    outcomes = list(harness.run("b", "cpu", CEILINGS, seconds=0.01))
    assert isinstance(outcomes[0], Result)
    assert outcomes[1] == Failure("b", "setting up", "MemoryError: too large")


def test_missing_peer_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_left_out", [])
    assert harness.optional("no_such_package") is None
    assert harness.optional("no_such_package") is None
    assert harness.optional("json") is not None
    assert harness.left_out() == ["no_such_package is not installed, so it is left out"]


def test_unknown_benchmark_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="rms_norm"):
        harness.load("nope", "cpu")


@pytest.mark.parametrize("name", harness.available())
def test_every_benchmark_says_what_it_measures_and_gives_cases(name: str) -> None:
    tree = ast.parse(Path(harness.__file__).with_name(f"bench_{name}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert any(isinstance(node, ast.FunctionDef) and node.name == "cases" for node in tree.body)
