"""When a run evaluates, saves, and begins to let the learning rate fall."""

from __future__ import annotations

import time

from fastlm.training.checkpoint import TrainingState
from fastlm.training.config import TrainingConfig

FINAL_SHARE = 0.15  # most of a time limit that the final evaluation may take; it scores a sample where all takes longer
PLOT_SECONDS = 2.0  # importing matplotlib and drawing
PACE_STEPS = 20  # steps over which speed is averaged for display


class Clock:
    """Decides by time what does not change the weights (when to evaluate, when to save) and when the decay begins.

    Every time is a difference of the monotonic clock, so that the system's clock may be set, back too, during a run.
    """

    def __init__(
        self,
        config: TrainingConfig,
        state: TrainingState,
        started_at: float,
        *,
        validation_size: int,
        partial_size: int,
        max_final_size: int | None = None,
    ) -> None:
        now = time.monotonic()
        self.config = config
        self.state = state
        self.validation_size = validation_size
        self.partial_size = partial_size
        self.max_final_size = validation_size if max_final_size is None else min(max_final_size, validation_size)
        if config.steps is not None and not state.stopped_early:
            state.total_steps = config.steps
        # What is left for the loop. After an interruption the start-up is paid again and not counted.
        startup = now - started_at if state.step == 0 else 0.0
        self.budget = None if config.minutes is None else max(0.0, config.minutes * 60.0 - startup)
        self.seconds_each: float | None = None  # a window, in the quickest evaluation: the first one warms up
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
        pace = seconds / max(1, min(self.partial_size, self.validation_size))
        self.seconds_each = min(pace, self.seconds_each or pace)

    def final_size(self) -> int:
        """How many windows the final evaluation scores."""
        most = self.max_final_size
        if self.budget is None or self.seconds_each is None:
            return most
        return min(most, max(self.partial_size, int(FINAL_SHARE * self.budget / self.seconds_each)))

    @property
    def final_seconds(self) -> float:
        if self.seconds_each is None:
            return 0.05 * self.budget if self.budget else 0.0  # a guess until the first evaluation
        return self.final_size() * self.seconds_each + PLOT_SECONDS

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
