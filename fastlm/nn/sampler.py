"""Sampling as a module, with its settings fixed."""

from __future__ import annotations

from torch import Tensor, nn

from fastlm.ops import sample


class Sampler(nn.Module):
    """Draws the next token of each row.

    Args:
        temperature: 0 takes the most probable token.
        top_k, top_p, min_p: filters on the distribution; None leaves it whole.

    Shapes: logits `(batch, vocab_size)`, seeds and positions `(batch,)` int64 -> ids `(batch,)` int64. A row's draw
    depends on its logits, seed and position alone.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p

    def forward(self, logits: Tensor, seed: int | Tensor, position: int | Tensor) -> Tensor:
        return sample(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
            position=position,
        ).ids
