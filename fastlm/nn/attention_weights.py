"""Where a head looks: its softmax weights, taken while a model reads one text."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import attention


class AttentionRecorder:
    """A `Cache` that keeps no keys: it attends within one text, and records one head of one layer.

    `weights` is then `(seq, seq)` fp32: row i holds what the query of token i gives to each token, and sums to 1.
    """

    def __init__(self, layer: int, head: int, device: torch.device) -> None:
        self.layer = layer
        self.head = head
        self.weights = torch.empty(0, 0)
        self._device = device

    def positions(self, seq: int) -> Tensor:
        return torch.arange(seq, device=self._device)[None]

    def end(self, seq: int) -> int:
        return seq

    def advance(self, num_tokens: int) -> None:
        pass

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """See `Cache.attend`; q, k and v have one row."""
        if layer == self.layer:
            query = q[0, :, self.head].float()
            key = k[0, :, self.head * k.shape[2] // q.shape[2]].float()
            scores = query @ key.T * (q.shape[-1] ** -0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            distance = torch.arange(len(query), device=q.device)[:, None] - torch.arange(len(query), device=q.device)
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            self.weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out = attention(q, k, v, causal=True, window=window, softcap=softcap, scale=scale)
        assert isinstance(out, Tensor)
        return out
