"""A moving average of the weights, which is often a better model than the last weights are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastlm.training.distributed import full_tensor, like

PREFIX = "ema/"


class MovingAverage:
    """average ← decay · average + (1 - decay) · weight after each step, of the weights that are trained.

    The decay is at most (1 + steps) / (10 + steps), so that the first weights, which are random, are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step of this number, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.averages.items():
            average.lerp_(self.weights[name], 1.0 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's weights are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def apply(self) -> None:
        """The model's weights become the averages, for good."""
        for name, average in self.averages.items():
            self.weights[name].copy_(average)

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.averages.items():
            weight = self.weights[name]
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_tensors(self) -> dict[str, Tensor]:
        return {PREFIX + name: full_tensor(average) for name, average in self.averages.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Raises KeyError or RuntimeError when they are not those of this model."""
        for name, average in self.averages.items():
            average.copy_(like(tensors[PREFIX + name], self.weights[name]))
