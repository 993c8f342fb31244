"""What the training loop trains: a model, its batches, their loss, and how good it has become.

The loop knows steps, rates, checkpoints and time. Everything that pre-training, classification, instructions and
preferences do differently is here and in the objectives that derive from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from fastlm.errors import ConfigError
from fastlm.training.config import TrainingConfig
from fastlm.training.distributed import World
from fastlm.training.model_files import ModelFiles

Part = TypeVar("Part")


@dataclass(frozen=True)
class Score:
    """How good a model is on validation data. `value`: what best checkpoints go by, lower is better."""

    value: float
    metrics: dict[str, Any]
    partial: bool  # of a sample of the data


class Objective(ABC, Generic[Part]):
    """A model to train and what to train it on.

    The parameters of `model` that require a gradient are trained. A step's batch depends on its number alone.
    """

    model: nn.Module
    tokens_per_step: int  # for the display of the pace; of an average step
    files: ModelFiles
    world: World
    validation_size: int  # windows or examples that a whole evaluation scores; 0: there is nothing to score
    partial_size: int  # of those, how many an evaluation during the run scores
    max_final_size: int | None = None  # the most that the final one scores

    @abstractmethod
    def parts(self, step: int) -> list[Part]:
        """This process's share of the batch of a step, counted from 0, in the parts that it is computed in."""

    @abstractmethod
    def loss(self, part: Part) -> Tensor:
        """The part's share of the batch's mean loss: the shares of all parts in all processes add up to it."""

    @abstractmethod
    def evaluate(self, size: int, should_stop: Callable[[], bool] | None = None) -> Score | None:
        """The score on `size` evenly spread windows or examples; None when `should_stop` said so. The same in every
        process."""

    def sample(self) -> str | None:
        """What the model writes as it is now; None where nothing was asked."""
        return None


def check_divisible(config: TrainingConfig, world: World) -> None:
    """Raises ConfigError unless every process gets as many examples of a batch, in parts of one size."""
    if config.batch_size % (config.accumulation * world.size):
        raise ConfigError(
            f"batch_size must be a multiple of processes times accumulation, {world.size} x {config.accumulation}, "
            f"not {config.batch_size}"
        )
