"""A training step beside other people's arithmetic: transformers' loss and gradients, and float64."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.errors import DataError
from fastlm.model import ModelConfig, Transformer, save_model
from fastlm.training import TokenDataset, TrainingConfig, prepare, train
from fastlm.training.trainer import LanguageModeling
from tests.training.test_resume import EVERY_STEP, losses, start

transformers = pytest.importorskip("transformers")

CONFIG = ModelConfig(
    vocab_size=400, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96,
    context_length=64, qk_norm=True,
)  # fmt: skip
VARIANTS = {
    "qwen3": CONFIG,
    "llama": replace(CONFIG, qk_norm=False, tie_embeddings=False, num_kv_heads=4),
    "gemma3": replace(
        CONFIG, norm_placement="around", norm_weight_offset=1.0, activation="gelu_tanh", scale_embeddings=True,
        query_pre_attn_scalar=24.0, sliding_window=16, full_attention_layers=(2,), rope_theta=1e6, rope_local_theta=1e4,
    ),
}  # fmt: skip


@pytest.fixture(params=VARIANTS)
def both(request, tmp_path: Path) -> tuple[Transformer, torch.nn.Module]:
    model = Transformer(VARIANTS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model(model, tmp_path, eos_token_id=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    return model.train(), theirs.train()


def test_the_loss_of_a_step_is_that_of_transformers(both, dataset: TokenDataset) -> None:
    ours, theirs = both
    objective = LanguageModeling(ours, dataset, TrainingConfig(steps=1, batch_size=4, accumulation=2))
    loss = sum(objective.loss(part) for part in objective.parts(0))
    inputs, targets = objective.sampler.batch(0)
    labels = torch.cat([inputs, targets[:, -1:]], 1)  # transformers shifts them itself, and ignores the first
    padded = torch.cat([inputs, inputs[:, -1:]], 1)
    expected = theirs(padded, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-6)


def test_gradients_of_the_whole_model_are_as_near_to_float64_as_those_of_transformers(both) -> None:
    ours, theirs = both
    ids, targets = torch.randint(0, 400, (4, 64)), torch.randint(0, 400, (4, 64))

    def their_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits = model(ids).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    ours.loss(ids, targets).backward()
    mine = {name: p.grad for name, p in ours.named_parameters()}
    plain = their_gradients(theirs)
    exact = their_gradients(theirs.double())
    assert mine.keys() == exact.keys()
    for name, wanted in exact.items():
        error = (mine[name].double() - wanted).norm() / wanted.norm()
        allowed = (plain[name].double() - wanted).norm() / wanted.norm()
        assert error <= 2 * allowed + 1e-7, (name, error, allowed)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_steps_is_the_run_that_was_not(dataset, tiny: ModelConfig, tmp_path) -> None:
    config = replace(EVERY_STEP, steps=150)
    assert start(tiny, config, dataset, tmp_path / "whole").wait(240) == 0
    rng = np.random.default_rng()
    kills = 0
    for _ in range(20):
        process = start(tiny, config, dataset, tmp_path / "killed")
        log = tmp_path / "killed" / "log.jsonl"
        begun = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (log.stat().st_size if log.exists() else 0) == begun:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.15))  # anywhere in a step or in the writing of a checkpoint
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(60)
    assert start(tiny, config, dataset, tmp_path / "killed").wait(240) == 0 or kills < 20
    assert kills >= 10
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_a_clock_that_is_set_back_changes_nothing(dataset, tiny: ModelConfig, tmp_path: Path, monkeypatch) -> None:
    config = TrainingConfig(steps=6, batch_size=4, warmup_steps=2)
    train(tiny, config, dataset, tmp_path / "plain")
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    train(tiny, config, dataset, tmp_path / "back")
    assert losses(tmp_path / "back") == losses(tmp_path / "plain")
    assert json.loads((tmp_path / "back" / "result.json").read_text())["seconds"] >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["splits"]["train"].update(shards=[]), "0 tokens: too few for a context"),
        (lambda m: m.update(dtype="uint32"), "is truncated"),
        (lambda m: m.update(dtype="float16"), "of another version"),
        (lambda m: m["splits"]["valid"].update(shards=[]), "validation split holds no text"),
    ],
    ids=["empty split", "wider dtype", "no integers", "nothing to score"],
)
def test_prepared_data_that_is_not_what_it_says_is_refused_and_no_run_begins(
    text_file: Path, tiny: ModelConfig, tmp_path: Path, change, message: str
) -> None:
    prepare([text_file], tmp_path / "data", vocab_size=400)
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        train(tiny, EVERY_STEP, TokenDataset(tmp_path / "data"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
