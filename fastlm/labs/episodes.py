"""Small puzzles as training data: an objective whose batches are drawn by a function, trained by the usual loop.

For what no text holds in the right dose: recalling a token, copying a pattern, adding numbers. Each step's batch is
drawn from the seed and the step's number, so no puzzle is seen twice and runs repeat exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlm.model import build_model
from fastlm.model.checkpoint import AnyConfig, LanguageModel, write_config
from fastlm.training import Progress, TrainingConfig
from fastlm.training.distributed import World
from fastlm.training.loop import run_loop
from fastlm.training.model_files import LanguageModelFiles
from fastlm.training.objective import Objective, Score
from fastlm.training.run_directory import begin_run

IGNORED = -100  # a target that counts for nothing


class Episodes(NamedTuple):
    """`inputs` and `targets`: `(rows, length)` int64; targets of IGNORED are not scored."""

    inputs: Tensor
    targets: Tensor


Draw = Callable[[np.random.Generator, int], Episodes]
"""Draws that many rows."""


class EpisodeObjective(Objective[Episodes]):
    """The mean loss over the scored targets of freshly drawn puzzles."""

    validation_size = 0
    partial_size = 0

    def __init__(self, model: LanguageModel, draw: Draw, config: TrainingConfig) -> None:
        self.model = self.language_model = model
        self.files = LanguageModelFiles(model, None)
        self.world = World()
        self.draw = draw
        self.config = config
        self.tokens_per_step = self._batch(0).inputs.numel()

    def _batch(self, step: int) -> Episodes:
        return self.draw(np.random.default_rng([self.config.seed, step]), self.config.batch_size)

    def parts(self, step: int) -> list[Episodes]:
        return [self._batch(step)]

    def loss(self, part: Episodes) -> Tensor:
        return self.language_model.loss(part.inputs, part.targets)

    def evaluate(self, size: int, should_stop: Callable[[], bool] | None = None) -> Score | None:
        return None


@dataclass(frozen=True)
class _Description:
    model: dict[str, Any]
    training: TrainingConfig

    def to_dict(self) -> dict[str, Any]:
        return {"task": "episodes", **asdict(self)}


def train_on_episodes(
    model_config: AnyConfig,
    draw: Draw,
    config: TrainingConfig,
    out: Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
) -> LanguageModel:
    """A model of random weights (from the config's seed) after `config.steps` batches; its run lies in `out`."""
    torch.manual_seed(config.seed)
    model = build_model(model_config)
    begin_run(out, _Description(model_config.to_dict(), config))
    write_config(model_config, out)
    run_loop(EpisodeObjective(model, draw, config), config, out, on_progress=on_progress)
    return model.eval()


@torch.inference_mode()
def logits_of(model: LanguageModel, inputs: Tensor, rows: int = 64) -> Tensor:
    """Logits `(rows, length, vocab_size)` fp32 at every place, in batches of `rows`."""
    return torch.cat([model(part).float() for part in inputs.split(rows)])
