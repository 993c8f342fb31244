"""The training loop.

A step depends on the weights, the optimizer's state, torch's random state and the step's number, and all of them are in
a checkpoint: a run that was killed and continued gives the same losses, to the last bit, as one that was not (on the
same machine, with the same number of threads).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from fastlm._files import write_atomic
from fastlm.errors import DataError, TrainingError
from fastlm.model.checkpoint import AnyConfig, build_model, write_config
from fastlm.training.checkpoint import (
    TrainingState,
    checkpoint_directories,
    load_checkpoint,
    remove_leftovers,
    save_best,
    save_checkpoint,
)
from fastlm.training.config import TrainingConfig
from fastlm.training.data import TokenDataset, WindowSampler
from fastlm.training.evaluate import Evaluation, evaluate, windows
from fastlm.training.log import TrainingLog, plot_losses
from fastlm.training.optimizer import Optimizer
from fastlm.training.run_directory import RESULT_FILE, RunDescription, begin_run
from fastlm.training.schedule import learning_rate_scale, total_steps_when_decay_begins

PARTIAL_WINDOWS = 32  # of an evaluation during the run: about 0.3 s for a small model on two cores
MAX_FINAL_WINDOWS = 8192  # of the final evaluation: a million tokens, a minute or two for a small model on two cores
FINAL_SHARE = 0.15  # most of a time limit that the final evaluation may take; it scores a sample where all takes longer
PLOT_SECONDS = 2.0  # importing matplotlib and drawing
PACE_STEPS = 20  # steps over which speed is averaged for display


@dataclass(frozen=True)
class Progress:
    """Where a run is. Given to `on_progress` after each step, each evaluation and each checkpoint."""

    stage: Literal["training", "evaluating", "final evaluation"]
    step: int
    total_steps: int | None  # None until a run limited by time has fixed it
    fraction: float  # of the whole run, 0 to 1
    loss: float  # of the last step, nats a token
    tokens_per_second: float
    seconds_left: float | None
    valid_bits_per_byte: float | None  # of the last evaluation
    skipped_steps: int


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to. `loss` (nats a token), `bits_per_byte` and `perplexity` are of the validation split: all of
    it, or with `partial` evenly spaced windows of it.

    They are None when the run was interrupted; the same call continues it.
    """

    interrupted: bool
    steps: int
    total_steps: int | None
    loss: float | None
    bits_per_byte: float | None
    perplexity: float | None
    partial: bool
    seconds: float  # in the training loop, over all interruptions
    tokens: int  # trained on
    skipped_steps: int
    parameters: int


def train(
    model_config: AnyConfig,
    config: TrainingConfig,
    dataset: TokenDataset,
    out: str | Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    started_at: float | None = None,
    device: torch.device | str = "cpu",
) -> TrainingResult:
    """Trains a model and writes it to the directory `out`; goes on where an unfinished run of the same options stopped.

    Args:
        model_config: its vocabulary is that of `dataset.tokenizer`.
        out: gets config.json, model.safetensors, tokenizer.json (a model directory), log.jsonl, loss.png, result.json,
            run.json and checkpoints/.
        on_progress: called often, in this thread.
        should_stop: asked after each step; when it says yes, a checkpoint is written and training returns.
        started_at: `time.monotonic()` at which `config.minutes` began to count; by default now.

    Raises:
        ConfigError: `out` holds a finished run or one with other options.
        DataError: the data is too short for the context.
        CheckpointError: the checkpoint to go on from is damaged, or one cannot be written.
        TrainingError: too many steps in a row had a loss or gradient that is not finite.
    """
    out = Path(out)
    started_at = time.monotonic() if started_at is None else started_at
    should_stop = should_stop or (lambda: False)
    report = on_progress or (lambda progress: None)
    if model_config.vocab_size != dataset.tokenizer.vocab_size:
        raise DataError(
            f"the model has a vocabulary of {model_config.vocab_size}, "
            f"the tokenizer one of {dataset.tokenizer.vocab_size}"
        )
    sampler = WindowSampler(dataset.train, model_config.context_length, config.batch_size, config.seed)
    if len(dataset.valid) < 2:
        raise DataError("the validation split holds no text to score; give more text")
    data = str(dataset.directory.resolve())
    begin_run(out, RunDescription(model_config, config, data, dataset.manifest.fingerprint))

    torch.manual_seed(config.seed)
    model = build_model(model_config).to(device).train()
    optimizer = Optimizer(model, config)
    state = TrainingState()
    remove_leftovers(out)
    checkpoints = checkpoint_directories(out)
    if checkpoints:
        state = load_checkpoint(checkpoints[-1], model, optimizer)
    dataset.tokenizer.save(out / "tokenizer.json")
    write_config(model_config, out, eos_token_id=dataset.eos_token_id)

    parameters = list(model.parameters())
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    autocast = torch.autocast(model.output_weight.device.type, dtype=dtype, enabled=dtype != torch.float32)
    log = TrainingLog(out / "log.jsonl", keep_until_step=state.step)
    clock = _Clock(
        config, state, started_at, windows_in_all=len(windows(len(dataset.valid), model_config.context_length))
    )
    valid: Evaluation | None = None
    loss_value = math.nan

    def progress(stage: Literal["training", "evaluating", "final evaluation"]) -> Progress:
        return Progress(
            stage=stage,
            step=state.step,
            total_steps=state.total_steps,
            fraction=clock.fraction(),
            loss=loss_value,
            tokens_per_second=clock.steps_per_second * config.batch_size * model_config.context_length,
            seconds_left=clock.seconds_left(),
            valid_bits_per_byte=valid.bits_per_byte if valid else state.best_bits_per_byte,
            skipped_steps=state.skipped_steps,
        )

    try:
        while state.total_steps is None or state.step < state.total_steps:
            if state.total_steps is None and clock.decay_is_due():
                state.total_steps = total_steps_when_decay_begins(state.step, config.decay_fraction)
                continue
            step = state.step
            inputs, targets = (tensor.to(device) for tensor in sampler.batch(step))

            loss_value = 0.0
            for part, part_targets in zip(
                inputs.chunk(config.accumulation), targets.chunk(config.accumulation), strict=True
            ):
                with autocast:
                    loss = model.loss(part, part_targets) / config.accumulation
                loss.backward()
                loss_value += loss.item()
            gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip).item()

            scale = learning_rate_scale(step, state.total_steps, config.warmup_steps, config.decay_fraction)
            if math.isfinite(loss_value) and math.isfinite(gradient_norm):
                optimizer.step(scale)
                state.skipped_in_a_row = 0
            else:
                optimizer.zero_grad()
                state.skipped_steps += 1
                state.skipped_in_a_row += 1
            state.step += 1
            clock.step_done()
            log.write(
                step=state.step,
                loss=loss_value,
                gradient_norm=gradient_norm,
                scale=scale,
                seconds=round(state.seconds, 3),
            )
            if state.skipped_in_a_row >= config.max_skipped_steps:
                raise TrainingError(
                    f"loss or gradient was not finite in {state.skipped_in_a_row} steps in a row, "
                    f"up to step {state.step}; "
                    "use a lower --lr, or check the data"
                )
            report(progress("training"))

            if should_stop():
                save_checkpoint(out, model, optimizer, state, eos_token_id=dataset.eos_token_id)
                return _result(config, model_config, state, parameters, None)
            if clock.evaluation_is_due():
                state.evaluations += 1
                begun = time.monotonic()
                valid = evaluate(model, dataset.valid, dataset.eos_token_id, max_windows=PARTIAL_WINDOWS, dtype=dtype)
                assert valid is not None
                clock.evaluated(time.monotonic() - begun)
                log.write(
                    step=state.step,
                    valid_loss=valid.loss,
                    valid_bits_per_byte=valid.bits_per_byte,
                    partial=valid.partial,
                )
                if state.best_bits_per_byte is None or valid.bits_per_byte < state.best_bits_per_byte:
                    state.best_bits_per_byte = valid.bits_per_byte
                    save_best(out, model, eos_token_id=dataset.eos_token_id)
                report(progress("evaluating"))
            if clock.checkpoint_is_due():
                save_checkpoint(out, model, optimizer, state, eos_token_id=dataset.eos_token_id)
                clock.checkpoint_done()

        save_checkpoint(out, model, optimizer, state, eos_token_id=dataset.eos_token_id)
        report(progress("final evaluation"))
        final = evaluate(
            model,
            dataset.valid,
            dataset.eos_token_id,
            max_windows=clock.final_windows(),
            dtype=dtype,
            should_stop=should_stop,
        )
        if final is None:
            return _result(config, model_config, state, parameters, None)
        log.write(
            step=state.step, valid_loss=final.loss, valid_bits_per_byte=final.bits_per_byte, partial=final.partial
        )
    finally:
        log.close()
    result = _result(config, model_config, state, parameters, final)
    plot_losses(out / "log.jsonl", out / "loss.png")
    write_atomic(out / RESULT_FILE, json.dumps(asdict(result), indent=2) + "\n")
    return result


def _result(
    config: TrainingConfig,
    model_config: AnyConfig,
    state: TrainingState,
    parameters: list[torch.nn.Parameter],
    final: Evaluation | None,
) -> TrainingResult:
    return TrainingResult(
        interrupted=final is None,
        steps=state.step,
        total_steps=state.total_steps,
        loss=final.loss if final else None,
        bits_per_byte=final.bits_per_byte if final else None,
        perplexity=final.perplexity if final else None,
        partial=final.partial if final else False,
        seconds=round(state.seconds, 3),
        tokens=state.step * config.batch_size * model_config.context_length,
        skipped_steps=state.skipped_steps,
        parameters=sum(p.numel() for p in parameters),
    )


class _Clock:
    """Decides by time what does not change the weights (when to evaluate, when to save) and when the decay begins."""

    def __init__(self, config: TrainingConfig, state: TrainingState, started_at: float, windows_in_all: int) -> None:
        now = time.monotonic()
        self.config = config
        self.state = state
        self.windows_in_all = windows_in_all
        if config.steps is not None:
            state.total_steps = config.steps
        # What is left for the loop. After an interruption the start-up is paid again and not counted.
        startup = now - started_at if state.step == 0 else 0.0
        self.budget = None if config.minutes is None else max(0.0, config.minutes * 60.0 - startup)
        self.seconds_per_window: float | None = None  # of the quickest evaluation: the first one warms up
        self.begun = now - state.seconds
        self.last_checkpoint = now
        self.recent = [now]
        self.steps_per_second = 0.0

    def step_done(self) -> None:
        now = time.monotonic()
        self.state.seconds = now - self.begun
        self.recent = [*self.recent[-PACE_STEPS:], now]
        self.steps_per_second = (len(self.recent) - 1) / max(1e-9, now - self.recent[0])

    def evaluated(self, seconds: float) -> None:
        pace = seconds / min(PARTIAL_WINDOWS, self.windows_in_all)
        self.seconds_per_window = min(pace, self.seconds_per_window or pace)

    def final_windows(self) -> int:
        """How many windows the final evaluation scores."""
        most = min(self.windows_in_all, MAX_FINAL_WINDOWS)
        if self.budget is None or self.seconds_per_window is None:
            return most
        return min(most, max(PARTIAL_WINDOWS, int(FINAL_SHARE * self.budget / self.seconds_per_window)))

    @property
    def final_seconds(self) -> float:
        if self.seconds_per_window is None:
            return 0.05 * self.budget if self.budget else 0.0  # a guess until the first evaluation
        return self.final_windows() * self.seconds_per_window + PLOT_SECONDS

    def decay_is_due(self) -> bool:
        assert self.budget is not None
        return self.state.seconds >= (self.budget - self.final_seconds) * (1.0 - self.config.decay_fraction)

    def fraction(self) -> float:
        if self.state.total_steps is not None:
            return min(1.0, self.state.step / self.state.total_steps)
        assert self.budget is not None
        return min(1.0, self.state.seconds / max(1e-9, self.budget - self.final_seconds))

    def seconds_left(self) -> float | None:
        if self.state.total_steps is None:
            assert self.budget is not None
            return max(0.0, self.budget - self.state.seconds)
        if self.steps_per_second == 0.0:
            return None
        return (self.state.total_steps - self.state.step) / self.steps_per_second + self.final_seconds

    def evaluation_is_due(self) -> bool:
        due = self.state.evaluations < self.config.evaluations * self.fraction() - 1e-9
        return due and self.state.evaluations + 1 < max(2, self.config.evaluations)  # the last one is the whole split

    def checkpoint_is_due(self) -> bool:
        return time.monotonic() - self.last_checkpoint >= self.config.checkpoint_seconds

    def checkpoint_done(self) -> None:
        self.last_checkpoint = time.monotonic()
