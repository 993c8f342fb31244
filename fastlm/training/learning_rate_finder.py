"""A learning rate from a short run in which it rises: Smith, "Cyclical Learning Rates", 2017 (arXiv 1506.01186), 3.3.

The rate grows by the same factor at each step until the loss grows with it. Suggested is the rate at which the smoothed
loss fell fastest against the logarithm of the rate, which lies well before the one at which it stops falling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlm._files import atomic_path
from fastlm.errors import TrainingError
from fastlm.training.config import TrainingConfig
from fastlm.training.objective import Objective
from fastlm.training.optimizer import Optimizer

LOWEST, HIGHEST = 1e-3, 100.0  # factors on the configured rates
SMOOTHING = 0.9  # weight of the past in the moving average of the loss
DIVERGED = 0.5  # nats above the best smoothed loss


@dataclass(frozen=True)
class RateSearch:
    """Factors on the configured rates, the smoothed loss after each, and the factor to take."""

    factors: list[float]
    losses: list[float]
    suggestion: float


def find_learning_rate(objective: Objective[Any], config: TrainingConfig, steps: int = 100) -> RateSearch:
    """Trains `objective.model` with rising rates; the model is of no use afterwards.

    Raises:
        TrainingError: the loss never fell.
    """
    optimizer = Optimizer(objective.model, config)
    parameters = [p for p in objective.model.parameters() if p.requires_grad]
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    autocast = torch.autocast(parameters[0].device.type, dtype=dtype, enabled=dtype != torch.float32)
    factors: list[float] = []
    losses: list[float] = []
    average = 0.0
    for step in range(steps):
        factor = LOWEST * (HIGHEST / LOWEST) ** (step / (steps - 1))
        value = 0.0
        for part in objective.parts(step):
            with autocast:
                loss = objective.loss(part)
            loss.backward()
            value += loss.item()
        if not math.isfinite(value):
            break
        torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        optimizer.step(factor)
        average = SMOOTHING * average + (1.0 - SMOOTHING) * value
        factors.append(factor)
        losses.append(average / (1.0 - SMOOTHING ** (step + 1)))
        if losses[-1] > min(losses) + DIVERGED:
            break
    lowest = losses.index(min(losses)) if losses else 0
    if lowest < 2:
        raise TrainingError("the loss fell at no learning rate; check the data")
    falls = [losses[i + 1] - losses[i] for i in range(lowest)]  # the factors are evenly apart on their scale
    return RateSearch(factors, losses, factors[falls.index(min(falls)) + 1])


def plot_rates(search: RateSearch, learning_rate: float, out: Path) -> None:
    """Draws the smoothed loss against the learning rate, with the suggestion."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.semilogx([factor * learning_rate for factor in search.factors], search.losses)
    axes.axvline(search.suggestion * learning_rate, color="tab:orange", label="suggested")
    axes.set_xlabel("learning rate of the blocks' matrices")
    axes.set_ylabel("loss, smoothed (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
