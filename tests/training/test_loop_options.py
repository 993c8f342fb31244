from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlm.errors import ConfigError
from fastlm.model import RNNConfig, load_model
from fastlm.training import TokenDataset, TrainingConfig, evaluate, train
from fastlm.training.log import read_log
from fastlm.training.samples import sample_text
from fastlm.training.schedule import learning_rate_scale
from fastlm.training.trainer import PARTIAL_WINDOWS
from tests.training.test_resume import after, losses

CONFIG = TrainingConfig(steps=14, batch_size=4, warmup_steps=2, checkpoint_seconds=1000)


def test_the_cosine_schedule_is_half_a_cosine_after_the_warm_up() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(40):
        assert learning_rate_scale(step, 40, 0, 1.0, "cosine") == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert learning_rate_scale(0, 40, 4, 1.0, "cosine") == 0.25


def test_the_moving_average_is_the_model_and_a_stopped_run_goes_on_exactly(dataset, tiny, tmp_path: Path) -> None:
    config = replace(CONFIG, ema=0.8)
    result = train(tiny, config, dataset, tmp_path / "whole")
    plain = train(tiny, CONFIG, dataset, tmp_path / "plain")
    assert losses(tmp_path / "whole") == losses(tmp_path / "plain")  # the average does not steer
    assert result.bits_per_byte != plain.bits_per_byte
    for steps in (1, 5):
        assert train(tiny, config, dataset, tmp_path / "stopped", should_stop=after(steps)).interrupted
    assert train(tiny, config, dataset, tmp_path / "stopped").bits_per_byte == result.bits_per_byte
    again = evaluate(load_model(tmp_path / "whole"), dataset.valid, dataset.eos_token_id)
    assert again.bits_per_byte == pytest.approx(result.bits_per_byte, rel=1e-6)


def test_the_moving_average_is_the_recurrence(dataset, tiny, tmp_path: Path) -> None:
    def weights(steps: int) -> torch.Tensor:
        out = tmp_path / str(steps)
        train(tiny, replace(CONFIG, ema=0.5, decay_fraction=0.05), dataset, out, should_stop=after(steps))
        [last] = sorted((out / "checkpoints").glob("step-*"))[-1:]
        return load_model(last).model.layers[0].self_attn.q_proj.weight.double()

    raw = [weights(steps) for steps in (1, 2, 3)]
    from safetensors.torch import load_file

    [first, *_, last] = [
        load_file(tmp_path / str(n) / "checkpoints" / f"step-{n:08d}" / "optimizer.safetensors")[
            "ema/model.layers.0.self_attn.q_proj.weight"
        ].double()
        for n in (1, 2, 3)
    ]
    expected = first
    for step in (2, 3):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * raw[step - 1]
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-6)


def test_a_run_that_gets_no_better_ends_early_with_its_best_weights(dataset, tiny, tmp_path: Path, monkeypatch) -> None:
    scores = iter([3.0, 2.0, 2.5, 2.1, 9.0])

    from fastlm.training.trainer import LanguageModeling, Score

    monkeypatch.setattr(
        LanguageModeling, "evaluate", lambda *_: Score(next(scores), {"loss": 1.0, "bits_per_byte": 2.0}, False)
    )
    result = train(tiny, replace(CONFIG, steps=40, evaluations=20, patience=2), dataset, tmp_path)
    assert result.steps < 40
    assert not result.interrupted
    best, last = (load_model(tmp_path / name) for name in ("checkpoints/best", "."))
    for a, b in zip(best.parameters(), last.parameters(), strict=True):
        assert torch.equal(a, b)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == len(losses(tmp_path))


def kept_best(run: Path) -> dict[int, Path]:
    return {int(d.name.removeprefix("best-")): d for d in sorted((run / "checkpoints").glob("best-*"))}


@pytest.mark.parametrize("ema", [None, 0.8])
def test_the_best_evaluations_keep_their_weights(dataset: TokenDataset, tiny, tmp_path: Path, ema) -> None:
    config = replace(CONFIG, steps=30, evaluations=10, keep_best=3, learning_rate=0.5, ema=ema)  # so that it wavers
    train(tiny, config, dataset, tmp_path)
    partial = [line for line in read_log(tmp_path / "log.jsonl") if "valid_loss" in line][:-1]
    assert len(partial) == 9
    best = sorted(partial, key=lambda line: (line["valid_bits_per_byte"], line["step"]))[:3]
    assert kept_best(tmp_path).keys() == {line["step"] for line in best}
    for line in best:
        model = load_model(kept_best(tmp_path)[line["step"]])
        again = evaluate(model, dataset.valid, dataset.eos_token_id, max_windows=PARTIAL_WINDOWS)
        assert again is not None
        assert again.bits_per_byte == pytest.approx(line["valid_bits_per_byte"], rel=1e-6)
    first = kept_best(tmp_path)[best[0]["step"]] / "model.safetensors"
    assert (tmp_path / "checkpoints" / "best" / "model.safetensors").read_bytes() == first.read_bytes()


def test_a_stopped_run_keeps_the_same_best_evaluations(dataset: TokenDataset, tiny, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=30, evaluations=10, keep_best=2, learning_rate=0.5)
    train(tiny, config, dataset, tmp_path / "whole")
    for steps in (7, 5, 9):
        assert train(tiny, config, dataset, tmp_path / "stopped", should_stop=after(steps)).interrupted
    train(tiny, config, dataset, tmp_path / "stopped")
    whole, stopped = (kept_best(tmp_path / name) for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    for step, directory in whole.items():
        assert (directory / "model.safetensors").read_bytes() == (stopped[step] / "model.safetensors").read_bytes()


def test_what_the_model_writes_is_logged_and_changes_no_step(dataset: TokenDataset, tiny, tmp_path: Path) -> None:
    config = replace(CONFIG, evaluations=4, ema=0.5)
    seen: list[str | None] = []
    train(
        tiny, config, dataset, tmp_path / "told", sample_prompt="이 영화",
        on_progress=lambda now: seen.append(now.sample) if now.stage == "evaluating" else None,
    )  # fmt: skip
    train(tiny, config, dataset, tmp_path / "silent")
    assert losses(tmp_path / "told") == losses(tmp_path / "silent")
    written = [line["sample"] for line in read_log(tmp_path / "told" / "log.jsonl") if "sample" in line]
    assert len(written) == 4  # three while training, and the last
    assert written[:3] == seen
    last = sample_text(load_model(tmp_path / "told"), dataset.tokenizer, "이 영화")
    assert written[-1] == last
    assert not any("sample" in line for line in read_log(tmp_path / "silent" / "log.jsonl"))


def test_one_best_evaluation_needs_no_directory_of_its_own(dataset: TokenDataset, tiny, tmp_path: Path) -> None:
    train(tiny, CONFIG, dataset, tmp_path)
    assert not kept_best(tmp_path)
    with pytest.raises(ConfigError, match="keep_best must be a positive integer"):
        replace(CONFIG, keep_best=0)


def test_activations_computed_again_give_the_same_run_from_fewer_bytes_kept(dataset, tiny, tmp_path: Path) -> None:
    kept: dict[bool, int] = {}
    for again in (False, True):
        total = [0]

        def pack(tensor: torch.Tensor, total: list[int] = total) -> torch.Tensor:
            total[0] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            config = replace(CONFIG, activation_checkpointing=again, steps=3)
            train(replace(tiny, num_layers=6), config, dataset, tmp_path / str(again))
        kept[again] = total[0]
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    norms = [[line.get("gradient_norm") for line in read_log(tmp_path / str(a) / "log.jsonl")] for a in (True, False)]
    assert norms[0] == norms[1]
    assert kept[True] < kept[False]
    with pytest.raises(ConfigError, match="only a transformer's activations"):
        train(RNNConfig(400, 16, 1, 32, "gru"), replace(CONFIG, activation_checkpointing=True), dataset, tmp_path / "r")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "steps"}, "schedule must be linear or cosine"),
        ({"ema": 1.0}, "ema must lie between 0 and 1"),
        ({"patience": 0}, "patience must be a positive integer"),
        ({"optimizer": "sgd"}, "optimizer must be muon or adamw"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict, message: str, dataset: TokenDataset) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


def test_a_rate_is_found_where_the_loss_falls(dataset: TokenDataset, tiny) -> None:
    from fastlm.model import build_model
    from fastlm.training.learning_rate_finder import find_learning_rate
    from fastlm.training.trainer import LanguageModeling

    torch.manual_seed(0)
    config = replace(CONFIG, optimizer="adamw", learning_rate=1e-2, embedding_learning_rate=1e-2, steps=1)
    search = find_learning_rate(LanguageModeling(build_model(tiny), dataset, config), config, steps=80)
    assert 1e-2 < search.suggestion < 30.0  # that is, from 1e-4 to 0.3
    assert min(search.losses) < search.losses[0] - 0.3
    at = search.factors.index(search.suggestion)
    assert search.losses[at] > min(search.losses)  # before the lowest point


def test_what_is_logged_is_there_for_tensorboard(dataset: TokenDataset, tiny, tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny, replace(CONFIG, steps=4), dataset, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx(list(losses(tmp_path).values()), rel=1e-6)
    assert events.Scalars("valid_loss")
