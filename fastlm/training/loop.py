"""The training loop.

A step depends on the weights, the optimizer's state, torch's random state and the step's number, and all of them are in
a checkpoint: a run that was killed and continued gives the same losses, to the last bit, as one that was not (on the
same machine, with the same number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastlm.errors import ConfigError, TrainingError
from fastlm.model.transformer import Decoder
from fastlm.training.checkpoint import (
    TrainingState,
    checkpoint_directories,
    load_optimizer,
    read_checkpoint,
    remove_leftovers,
    save_best,
    save_checkpoint,
)
from fastlm.training.clock import Clock
from fastlm.training.config import TrainingConfig
from fastlm.training.distributed import Parallel, Parallelism, full_tensor, losing_a_process_is_an_error
from fastlm.training.ema import PREFIX, MovingAverage
from fastlm.training.log import TrainingLog
from fastlm.training.objective import Objective, Score
from fastlm.training.optimizer import Optimizer
from fastlm.training.schedule import learning_rate_scale, total_steps_when_decay_begins

Stage = Literal["training", "evaluating", "final evaluation"]


@dataclass(frozen=True)
class Progress:
    """Where a run is. Given to `on_progress` after each step, each evaluation and each checkpoint."""

    stage: Stage
    step: int
    total_steps: int | None  # None until a run limited by time has fixed it
    fraction: float  # of the whole run, 0 to 1
    loss: float  # of the last step, nats a token or an example
    tokens_per_second: float
    seconds_left: float | None
    valid: Mapping[str, Any]  # metrics of the last evaluation; empty before the first
    skipped_steps: int
    sample: str | None = None  # what the model wrote after the last evaluation


@losing_a_process_is_an_error()
def run_loop(
    objective: Objective[Any],
    config: TrainingConfig,
    out: Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    started_at: float | None = None,
    parallel: Parallel = "ddp",
    tensorboard: bool = False,
) -> tuple[TrainingState, Score | None]:
    """Trains until the steps or the time are used up; goes on from the last checkpoint in `out`, if there is one.

    Returns:
        The state at the end and the final score, which is None when `should_stop` said so or nothing is to be scored.

    Where torchrun started several processes, each calls this; the first one reports and writes.

    Raises:
        CheckpointError: the checkpoint to go on from is damaged, or one cannot be written.
        TrainingError: too many steps in a row had a loss or gradient that is not finite.
    """
    world = objective.world
    should_stop = should_stop or (lambda: False)
    report = on_progress if on_progress and world.is_main else (lambda progress: None)
    model = objective.model.train()
    state = TrainingState()
    tensors: dict[str, torch.Tensor] = {}
    if world.is_main:
        remove_leftovers(out)
    checkpoints = world.from_main(lambda: checkpoint_directories(out))
    if checkpoints:
        state, tensors = read_checkpoint(checkpoints[-1], objective.files)
    if config.activation_checkpointing:
        decoder = getattr(model, "model", None)
        if not isinstance(decoder, Decoder):
            raise ConfigError("only a transformer's activations can be computed again; leave that option out")
        decoder.checkpoint_activations = True
    if config.patience is not None and world.size > 1 and parallel == "fsdp":
        raise ConfigError("stopping early is for whole models; leave out --patience or --parallel fsdp")
    spread = Parallelism(model, objective.loss, world, parallel)
    optimizer = Optimizer(model, config)
    average = None if config.ema is None else MovingAverage(model, config.ema)
    if checkpoints:
        averages = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
        load_optimizer(checkpoints[-1], optimizer, tensors)
        if average is not None:
            average.load_state_tensors(averages)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    autocast = torch.autocast(parameters[0].device.type, dtype=dtype, enabled=dtype != torch.float32)
    log = TrainingLog(out / "log.jsonl", keep_until_step=state.step, tensorboard=tensorboard) if world.is_main else None
    clock = Clock(
        config,
        state,
        time.monotonic() if started_at is None else started_at,
        validation_size=objective.validation_size,
        partial_size=objective.partial_size,
        max_final_size=objective.max_final_size,
    )
    valid: Mapping[str, Any] = {}
    sample: str | None = None
    loss_value = math.nan

    def progress(stage: Stage) -> Progress:
        return Progress(
            stage=stage,
            step=state.step,
            total_steps=state.total_steps,
            fraction=clock.fraction(),
            loss=loss_value,
            tokens_per_second=clock.steps_per_second * objective.tokens_per_step,
            seconds_left=clock.seconds_left(),
            valid=valid,
            skipped_steps=state.skipped_steps,
            sample=sample,
        )

    def write(**values: Any) -> None:
        if log is not None:
            log.write(step=state.step, **values)

    def save() -> None:
        spread.gather()
        optimizer_state = optimizer.state_tensors()
        if average is not None:
            optimizer_state |= average.state_tensors()
        if world.is_main:
            objective.files.model = spread.whole
            save_checkpoint(out, objective.files, optimizer_state, state)

    def save_what_was_scored(is_best: bool, is_kept: bool) -> None:
        with averaged():
            spread.gather()
            if world.is_main:
                objective.files.model = spread.whole
                if is_best:
                    save_best(out, objective.files)
                if is_kept:
                    save_best(out, objective.files, state.step)

    def averaged() -> AbstractContextManager[None]:
        return nullcontext() if average is None else average.in_place()

    def write_what_is_best() -> None:
        """Where that is not the last weights, the run's model becomes the best ones, or the average."""
        if state.stopped_early:
            objective.files.model = spread.whole
            objective.files.read(out / "checkpoints" / "best")
        elif average is not None:
            average.apply()
            spread.gather()
        else:
            return
        if world.is_main:
            objective.files.write(out)

    def evaluate(size: int, stop: Callable[[], bool] | None = None, during_training: bool = True) -> Score | None:
        nonlocal valid, sample
        model.eval()
        with averaged() if during_training else nullcontext():
            with autocast:
                score = objective.evaluate(size, stop)
            if world.is_main and score is not None:
                sample = objective.sample()
        model.train()
        if score is not None:
            valid = score.metrics
            write(**{f"valid_{k}": v for k, v in score.metrics.items()}, partial=score.partial)
            if sample is not None:
                write(sample=sample)
        return score

    try:
        while state.total_steps is None or state.step < state.total_steps:
            if state.total_steps is None and world.from_main(clock.decay_is_due):
                state.total_steps = total_steps_when_decay_begins(state.step, config.decay_fraction)
                continue
            step = state.step
            loss_value = 0.0
            parts = objective.parts(step)
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                spread.before(last=last)
                with autocast:
                    loss = spread.loss(part)
                spread.backward(loss, last=last)
                loss_value += loss.item()
            [loss_value] = world.sum(loss_value)
            gradient_norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)).item()

            scale = learning_rate_scale(
                step, state.total_steps, config.warmup_steps, config.decay_fraction, config.schedule
            )
            if math.isfinite(loss_value) and math.isfinite(gradient_norm):
                optimizer.step(scale)
                if average is not None:
                    average.update(step + 1)
                state.skipped_in_a_row = 0
            else:
                optimizer.zero_grad()
                state.skipped_steps += 1
                state.skipped_in_a_row += 1
            state.step += 1
            clock.step_done()
            write(
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

            stop, evaluation_is_due, checkpoint_is_due = world.any(
                should_stop(),
                world.is_main and objective.validation_size > 0 and clock.evaluation_is_due(),
                world.is_main and clock.checkpoint_is_due(),
            )
            if stop:
                save()
                return state, None
            if evaluation_is_due:
                state.evaluations += 1
                begun = time.monotonic()
                score = evaluate(objective.partial_size)
                assert score is not None
                clock.evaluated(time.monotonic() - begun)
                is_best = state.best_score is None or score.value < state.best_score
                is_kept = config.keep_best > 1 and math.isfinite(score.value)
                is_kept = is_kept and state.is_among_best(score.value, config.keep_best)
                if is_best or is_kept:
                    save_what_was_scored(is_best, is_kept)
                if is_best:
                    state.best_score = score.value
                    state.evaluations_since_best = 0
                else:
                    state.evaluations_since_best += 1
                    if config.patience is not None and state.evaluations_since_best >= config.patience:
                        state.stopped_early = True
                        state.total_steps = state.step
                report(progress("evaluating"))
            if checkpoint_is_due:
                save()
                clock.checkpoint_done()

        save()
        write_what_is_best()
        report(progress("final evaluation"))
        if not objective.validation_size:
            return state, None
        # Of several processes none may stop alone.
        return state, evaluate(world.from_main(clock.final_size), should_stop if world.size == 1 else None, False)
    finally:
        if log is not None:
            log.close()
