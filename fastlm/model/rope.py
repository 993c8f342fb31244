"""Rotary tables of a model: as long as they are needed, fp32, apart from parameters and buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlm.model.config import ModelConfig, RopeScaling
from fastlm.ops import rotary_tables

FIRST_LENGTH = 1024  # positions; enough for most uses, a millisecond to make


class RotaryTables:
    """cos and sin for each layer, `(positions, head_dim // 2)`.

    They grow by doubling, since the tables of a long context would take longer to fill than a model takes to load. They
    are no buffers, because `model.to(torch.bfloat16)` must not round angles.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.context_length = config.context_length
        frequencies = scaled_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self._frequencies = [frequencies]
        self._kind = [0] * config.num_layers  # of each layer: which of the frequencies
        if config.rope_local_theta is not None:
            self._frequencies.append(scaled_frequencies(config.head_dim, config.rope_local_theta, None))
            self._kind = [int(config.window(layer) is not None) for layer in range(config.num_layers)]
        self._tables: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}

    def tables(self, layer: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin) with at least `length` rows."""
        return self.kinds(length, device)[self._kind[layer]]

    def kinds(self, length: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """The different tables that layers have, each with at least `length` rows."""
        made = self._tables.get(device)
        if made is None or made[0][0].shape[0] < length:
            made = self._tables[device] = self._make(length, device)
        return made

    def kind(self, layer: int) -> int:
        """Which of `kinds` the layer has."""
        return self._kind[layer]

    def _make(self, length: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        rows = FIRST_LENGTH
        while rows < length:
            rows *= 2
        rows = max(length, min(rows, self.context_length))
        with torch.inference_mode(False):  # tables made while generating serve training as well
            return [
                rotary_tables(2 * f.shape[0], rows, frequencies=f.to(device), device=device) for f in self._frequencies
            ]


def scaled_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians a position of each pair, `(head_dim // 2,)`, fp64."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "factors":
        return frequencies / torch.tensor(scaling.factors, dtype=torch.float64, device="cpu")
    turns = scaling.original_context_length * frequencies / (2 * math.pi)  # over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
