"""What tuning records, and whom it believes; how candidates are compared. Measuring is played by stand-ins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlm.ops import tuning
from fastlm.ops.attention import tiles as tile_choice
from fastlm.ops.attention import trials
from fastlm.ops.attention.trials import Outcome, Shape

CHIP = {"device": "NVIDIA H100 80GB HBM3", "triton": "3.7.1", "fastlm": "0.1"}
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "chip", lambda device: CHIP)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    tuning._of.cache_clear()
    yield tmp_path
    tuning._of.cache_clear()


def test_what_is_saved_is_found_on_the_same_chip_and_adds_to_what_was_there(cache):
    assert tuning.record(GPU) is None
    path = tuning.save(CHIP, {"attention forward 128 causal": "gluon"}, {"forward 128 16-bit": [64, 64, 4, 3]})
    assert path == cache / "fastlm" / "tuned" / "nvidia-h100-80gb-hbm3-3.7.1.json"
    assert tuning.backend(GPU, "forward", 128, True) == "gluon"
    assert tuning.backend(GPU, "forward", 128, False) is None
    assert tuning.backend(GPU, "backward", 128, True) is None
    assert tuning.backend(torch.device("cpu"), "forward", 128, True) is None
    tuning.save(CHIP, {"attention forward 64 causal": "triton"}, {})
    assert tuning.backend(GPU, "forward", 64, True) == "triton"
    assert tuning.backend(GPU, "forward", 128, True) == "gluon"
    assert list(path.parent.iterdir()) == [path]


def test_tiles_of_the_record_come_before_the_defaults(cache):
    before = tile_choice.tiles("forward", 96, torch.bfloat16, 90, device=GPU)
    tuning.save(CHIP, {}, {"forward 128 16-bit": [32, 16, 4, 5]})
    assert tile_choice.tiles("forward", 96, torch.bfloat16, 90, device=GPU) == (32, 16, 4, 5)
    assert tile_choice.tiles("forward", 96, torch.float16, 90, device=GPU) == (32, 16, 4, 5)
    for options in ({"dtype": torch.float32}, {"head_dim": 64}, {"kernel": "keys"}, {"elements": True}):
        call = {"kernel": "forward", "head_dim": 96, "dtype": torch.bfloat16, "chip": 90} | options
        assert tile_choice.tiles(**call, device=GPU) == tile_choice.tiles(**call)
    assert tile_choice.tiles("forward", 96, torch.bfloat16, 90) == before


WHOLE = CHIP | {"backends": {}, "tiles": {}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a JSON object"),
        (json.dumps(WHOLE | {"device": "NVIDIA A100"}), "is of device NVIDIA A100, not NVIDIA H100 80GB HBM3"),
        (json.dumps(WHOLE | {"fastlm": "0.0"}), "is of fastlm 0.0, not 0.1"),
        (json.dumps(WHOLE | {"backends": {"attention forward 64 causal": 3}}), "has no table of backends"),
        (json.dumps(CHIP | {"backends": {}}), "has no table of tiles"),
        (json.dumps(WHOLE | {"tiles": {"forward 64 16-bit": [1, 2, 3]}}), "has no table of tiles"),
        (json.dumps(WHOLE | {"tiles": {"forward 64 16-bit": [64, 64, 4, -1]}}), "has no table of tiles"),
    ],
)
def test_a_record_that_does_not_count_is_told_and_left_aside(text, told):
    path = tuning.path(CHIP)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match=told):
        assert tuning.record(GPU) is None
    tuning.save(CHIP, {"attention forward 64 causal": "triton"}, {})
    assert tuning.backend(GPU, "forward", 64, True) == "triton"


SHAPE = Shape(64, 2, 1, 64, "bfloat16")


def tuned(answers, train=True):
    """`answers`: (direction, "gluon" or the tiles that differ from the default) -> Outcome; 10 ms where not given."""
    told = []

    def measure(shape, direction, backends, tiles):
        assert shape == SHAPE
        candidate = "gluon" if f"attention {direction} 64 causal" in backends else json.dumps(tiles)
        return answers.get((direction, candidate), Outcome(10.0))

    found = trials.tune(SHAPE, train, measure, lambda name, outcome: told.append((name, outcome)))
    assert dict(told) == found.outcomes
    return found


def test_the_fastest_right_candidate_is_chosen():
    quick, wrong = json.dumps({"forward 64 16-bit": [64, 64, 4, 3]}), json.dumps({"forward 64 16-bit": [64, 128, 4, 2]})
    answers = {("forward", quick): Outcome(8.0), ("forward", wrong): Outcome(None, "wrong")}
    found = tuned(answers | {("forward", "gluon"): Outcome(5.0)}, train=False)
    assert found.tiles == {"forward 64 16-bit": [64, 64, 4, 3]}
    assert found.backends == {"attention forward 64 causal": "gluon"}
    assert not any(name.startswith("backward") for name in found.outcomes)
    found = tuned(answers | {("forward", "gluon"): Outcome(9.0)}, train=False)
    assert found.backends == {"attention forward 64 causal": "triton"}
    found = tuned(answers | {("forward", "gluon"): Outcome(None, "did not end within 120 s")}, train=False)
    assert found.backends == {"attention forward 64 causal": "triton"}


def test_when_defaults_are_fastest_nothing_is_recorded_of_tiles():
    assert tuned({}).tiles == {}


def test_a_default_that_fails_gives_way_to_a_candidate_that_is_right():
    found = tuned({("forward", "{}"): Outcome(None, "ended with code 1"), ("forward", "gluon"): Outcome(None, "wrong")})
    assert found.tiles["forward 64 16-bit"] == list(trials.CANDIDATES["forward"][0])
    assert found.backends["attention forward 64 causal"] == "triton"


def test_gluons_backward_is_tried_only_where_its_forward_serves():
    fast = Outcome(1.0)
    both = tuned({("forward", "gluon"): fast, ("backward", "gluon"): fast})
    assert both.backends == {"attention forward 64 causal": "gluon", "attention backward 64 causal": "gluon"}
    forward = tuned({("forward", "gluon"): fast, ("backward", "gluon"): Outcome(None, "wrong")})
    assert forward.backends == {"attention forward 64 causal": "gluon", "attention backward 64 causal": "triton"}
    assert "backward, gluon" not in tuned({("backward", "gluon"): fast}).outcomes


def test_a_candidate_runs_in_its_own_process_and_is_checked_and_timed(monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "triton")  # which the candidate does not hear of
    shape = Shape(32, 2, 1, 16, "float32", device="cpu")
    for direction in ("forward", "backward"):
        outcome = trials.measure(shape, direction, {}, {})
        assert outcome.problem is None
        assert outcome.milliseconds is not None
        assert outcome.milliseconds > 0
    refused = trials.measure(shape, "forward", {tuning.backend_key("forward", 16, True): "triton"}, {})
    assert refused == Outcome(None, "runs on CUDA tensors; these are on cpu")


def test_a_candidate_that_hangs_or_crashes_is_told():
    shape = Shape(32, 2, 1, 16, "float32", device="cpu")
    assert trials.measure(shape, "forward", {}, {}, timeout=0.05) == Outcome(None, "did not end within 0 s")
    crashed = trials.measure(shape._replace(dtype="no_such"), "forward", {}, {})
    assert "ended with code 1: AttributeError" in str(crashed.problem)


def test_a_wrong_candidate_is_not_timed(monkeypatch):
    shape = Shape(32, 2, 1, 16, "float32", device="cpu")
    right = trials.fused
    monkeypatch.setattr(trials, "fused", lambda *a: (right(*a)[0] * 1.01, right(*a)[1]))
    outcome = trials.trial(shape, "forward", {}, {})
    assert outcome.milliseconds is None
    assert "wrong for 333 × 333" in str(outcome.problem)
    monkeypatch.setattr(trials, "fused", lambda *a: (right(*a)[0], right(*a)[1] + 0.01))
    assert "wrong log-sum-exp" in str(trials.trial(shape, "forward", {}, {}).problem)
