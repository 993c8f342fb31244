"""Preferences: the objective that makes chosen answers likelier than rejected ones, beside the model as it was.

Rafailov et al., "Direct Preference Optimization", 2023 (arXiv 2305.18290), equation 7. The log-probabilities of the
model as it was are taken once, before training, so that no second model is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastlm.errors import ConfigError
from fastlm.model.classifier import groups
from fastlm.model.transformer import Transformer
from fastlm.tokenizer import Tokenizer
from fastlm.training.config import TrainingConfig
from fastlm.training.distributed import World
from fastlm.training.examples import Conversation, ExampleOrder, Preference, spread
from fastlm.training.instruction import TOKENS_AT_ONCE, Row, batch_of, rows_of
from fastlm.training.model_files import ModelFiles
from fastlm.training.objective import Objective, Score, check_divisible

PARTIAL_PAIRS = 64


class Pairs(NamedTuple):
    """Part of a batch: rows of the chosen answers and of the rejected ones, in turn."""

    rows: list[Row]
    reference: Tensor  # (rows,) log-probabilities by the model as it was
    total: int  # pairs of the whole step


class PreferenceTuning(Objective[Pairs]):
    """-log σ(β · ((log p/p₀)(chosen) - (log p/p₀)(rejected))), the mean over pairs."""

    partial_size = PARTIAL_PAIRS

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        train: Sequence[Preference],
        valid: Sequence[Preference],
        config: TrainingConfig,
        *,
        files: ModelFiles,
        beta: float = 0.1,
        max_length: int | None = None,
        world: World | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < beta < float("inf"):
            raise ConfigError(f"beta must be a positive number, not {beta!r}")
        self.model: Transformer = model
        self.files = files
        self.beta = beta
        self.world = world or World()
        self.accumulation = config.accumulation
        check_divisible(config, self.world)
        self.batch_size = config.batch_size
        self.device = device
        length = min(max_length or model.config.context_length, model.config.context_length)
        self.rows = _rows(tokenizer, train, length)
        self.valid_rows = _rows(tokenizer, valid, length)
        self.reference = self._by_the_model_as_it_is(self.rows)
        self.valid_reference = self._by_the_model_as_it_is(self.valid_rows)
        self.order = ExampleOrder(len(train), config.batch_size, config.seed)
        self.validation_size = len(valid)
        self.tokens_per_step = config.batch_size * sum(len(ids) for ids, _ in self.rows) // len(train)

    def parts(self, step: int) -> list[Pairs]:
        mine = self.world.mine(self.order.batch(step))
        chunks = [mine[i :: self.accumulation] for i in range(self.accumulation)]
        return [self._pairs(chunk, self.rows, self.reference, self.batch_size) for chunk in chunks]

    def loss(self, part: Pairs) -> Tensor:
        return -functional.logsigmoid(self.beta * self._margins(part)).sum() / part.total

    @torch.no_grad()
    def evaluate(self, size: int, should_stop: Callable[[], bool] | None = None) -> Score | None:
        margins = []
        chosen = spread(self.validation_size, size)
        for i in chosen:
            if should_stop is not None and should_stop():
                return None
            margins.append(self._margins(self._pairs([i], self.valid_rows, self.valid_reference, 1)))
        margin = torch.cat(margins).cpu()
        metrics = {
            "loss": -functional.logsigmoid(self.beta * margin).mean().item(),
            "accuracy": (margin > 0).double().mean().item(),
            "margin": margin.mean().item(),
        }
        return Score(metrics["loss"], metrics, len(chosen) < self.validation_size)

    def _pairs(self, indices: list[int], rows: list[Row], reference: Tensor, total: int) -> Pairs:
        places = [place for i in indices for place in (2 * i, 2 * i + 1)]
        return Pairs([rows[place] for place in places], reference[places], total)

    def _margins(self, part: Pairs) -> Tensor:
        """How much more the model has come to prefer the chosen answer, in nats: `(pairs,)`."""
        gains = self._logprobs(part.rows) - part.reference
        return gains[0::2] - gains[1::2]

    def _logprobs(self, rows: list[Row]) -> Tensor:
        """Of each row's answer, `(rows,)` fp32."""
        batch = batch_of(rows, 1, self.device)
        losses = self.model.loss(batch.ids[None], batch.targets[None], "none", cu_seqlens=batch.cu_seqlens)[0]
        row = torch.arange(len(rows), device=losses.device).repeat_interleave(batch.cu_seqlens.diff().long())
        return -torch.zeros(len(rows), device=losses.device).index_add(0, row, losses.float())

    @torch.no_grad()
    def _by_the_model_as_it_is(self, rows: list[Row]) -> Tensor:
        parts, done = [torch.zeros(0, device=self.device)], 0
        for group in groups([ids for ids, _ in rows], TOKENS_AT_ONCE):
            parts.append(self._logprobs(rows[done : done + len(group)]))
            done += len(group)
        return torch.cat(parts)


def _rows(tokenizer: Tokenizer, examples: Sequence[Preference], length: int) -> list[Row]:
    """The chosen answer and the rejected one of each example, in turn."""
    answers = [(example.prompt, answer) for example in examples for answer in (example.chosen, example.rejected)]
    return rows_of(tokenizer, [Conversation.of(*answer) for answer in answers], length)
