from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlm.errors import ConfigError, DataError, TrainingError
from fastlm.model import ModelConfig, RNNConfig, load_model
from fastlm.training import Progress, TokenDataset, TrainingConfig, evaluate, train
from fastlm.training.checkpoint import TrainingState
from fastlm.training.clock import Clock
from fastlm.training.log import read_log
from fastlm.training.trainer import MAX_FINAL_WINDOWS, PARTIAL_WINDOWS

CONFIG = TrainingConfig(steps=12, batch_size=4, warmup_steps=2, checkpoint_seconds=1000)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line]


def test_one_batch_is_learned_by_heart(dataset: TokenDataset, tiny: ModelConfig, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fastlm.training.data.WindowSampler._start", lambda self, index: 32 * (index % 4))
    train(tiny, replace(CONFIG, steps=100, evaluations=0), dataset, tmp_path)
    values = losses(tmp_path)
    assert values[0] > 5.5
    assert values[-1] < 0.5


def test_training_lowers_bits_per_byte_and_leaves_a_complete_directory(dataset, tiny, tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = train(tiny, replace(CONFIG, steps=60), dataset, tmp_path, on_progress=seen.append)
    assert not result.interrupted
    assert result.steps == 60
    assert result.bits_per_byte < 4.2  # the first step has about 5; a uniform byte, 8
    assert result.tokens == 60 * 4 * 32
    for name in ("config.json", "model.safetensors", "tokenizer.json", "loss.png", "result.json", "run.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "result.json").read_text())["bits_per_byte"] == result.bits_per_byte
    again = evaluate(load_model(tmp_path), dataset.valid, dataset.eos_token_id)
    assert again.bits_per_byte == pytest.approx(result.bits_per_byte, rel=1e-6)
    assert load_model(tmp_path / "checkpoints" / "best").config == tiny
    assert [p.step for p in seen if p.stage == "training"] == list(range(1, 61))
    assert [p.stage for p in seen].count("final evaluation") == 1
    assert seen[-1].fraction == 1.0
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_same_seed_gives_the_same_losses_and_another_does_not(dataset, tiny, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny, replace(CONFIG, seed=seed, steps=4), dataset, tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_accumulated_parts_give_the_gradients_of_the_whole_batch(dataset, tiny, tmp_path: Path) -> None:
    for name, parts in (("whole", 1), ("parts", 4)):
        train(tiny, replace(CONFIG, accumulation=parts, steps=5), dataset, tmp_path / name)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=2e-3)
    first = [read_log(tmp_path / name / "log.jsonl")[0] for name in ("whole", "parts")]
    assert first[0]["gradient_norm"] == pytest.approx(first[1]["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_recurrent_model_trains_by_the_same_loop(dataset, tmp_path: Path, cell: str) -> None:
    config = RNNConfig(dataset.tokenizer.vocab_size, 32, 1, 32, cell)
    result = train(config, replace(CONFIG, steps=40), dataset, tmp_path)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.5
    assert result.bits_per_byte == pytest.approx(
        evaluate(load_model(tmp_path), dataset.valid, dataset.eos_token_id).bits_per_byte, rel=1e-6
    )


def break_step(monkeypatch, bad_steps: range) -> None:
    """The loss of some steps is NaN, and so are its gradients."""
    from fastlm.model import Transformer

    plain, calls = Transformer.loss, {"n": -1}

    def loss(self, ids, targets, reduction="mean"):
        value = plain(self, ids, targets, reduction)
        if torch.is_grad_enabled():
            calls["n"] += 1
            if calls["n"] in bad_steps:
                return value * float("nan")
        return value

    monkeypatch.setattr(Transformer, "loss", loss)


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(dataset, tiny, tmp_path, monkeypatch) -> None:
    break_step(monkeypatch, range(3, 6))
    result = train(tiny, CONFIG, dataset, tmp_path)
    assert result.skipped_steps == 3
    assert result.steps == 12
    values = losses(tmp_path)
    assert [v != v for v in values] == [3 <= i < 6 for i in range(12)]
    assert all(torch.isfinite(p).all() for p in load_model(tmp_path).parameters())


def test_training_stops_after_too_many_steps_that_are_not_finite(dataset, tiny, tmp_path, monkeypatch) -> None:
    break_step(monkeypatch, range(2, 100))
    with pytest.raises(TrainingError, match="not finite in 3 steps in a row, up to step 5; use a lower --lr"):
        train(tiny, replace(CONFIG, max_skipped_steps=3), dataset, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_a_run_limited_by_time_equals_one_of_as_many_steps(dataset, tiny, tmp_path: Path) -> None:
    timed = train(tiny, replace(CONFIG, steps=None, minutes=0.05), dataset, tmp_path / "timed")
    counted = train(tiny, replace(CONFIG, steps=timed.steps), dataset, tmp_path / "counted")
    assert timed.steps > 3
    assert losses(tmp_path / "timed") == losses(tmp_path / "counted")
    assert timed.bits_per_byte == counted.bits_per_byte


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "either steps or minutes"),
        ({"minutes": 1.0}, "either steps or minutes"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"batch_size": 2.5}, "batch_size must be a positive integer"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"accumulation": 3}, "accumulation must divide batch_size"),
        ({"decay_fraction": 0.0}, "decay_fraction"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


def test_a_context_longer_than_the_data_leaves_no_run_behind(dataset, tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few for a context of 1000000"):
        train(replace(tiny, context_length=1_000_000), CONFIG, dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_for_another_vocabulary_is_refused(dataset, tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocabulary of 99"):
        train(replace(tiny, vocab_size=99), CONFIG, dataset, tmp_path)


def test_a_slow_evaluation_of_much_text_leaves_most_of_the_time_to_training() -> None:
    def clock_of(config: TrainingConfig, windows: int) -> Clock:
        sizes = {"validation_size": windows, "partial_size": PARTIAL_WINDOWS, "max_final_size": MAX_FINAL_WINDOWS}
        return Clock(config, TrainingState(), time.monotonic(), **sizes)

    clock = clock_of(TrainingConfig(minutes=1), 10_000)
    clock.evaluated(seconds=PARTIAL_WINDOWS * 0.1)  # at this pace all of the text would take 1,000 s
    assert clock.final_size() in (89, 90)
    assert clock.final_seconds < 12
    assert not clock.decay_is_due()
    clock.evaluated(seconds=PARTIAL_WINDOWS * 0.0001)  # once warm, it all fits
    assert clock.final_size() == MAX_FINAL_WINDOWS
    by_steps = clock_of(TrainingConfig(steps=5), 300)
    by_steps.evaluated(seconds=1e6)
    assert by_steps.final_size() == 300
