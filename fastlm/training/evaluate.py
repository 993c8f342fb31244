"""Loss, perplexity and bits per byte of a model on a validation split.

Windows of `context_length` tokens advance by half of that; each scores only the tokens that no window before it scored.
So every token, and with it every byte, is scored exactly once, and, but for the first window, after at least half a
context. End-of-text ids stand for no byte and are not scored. Bits per byte = sum of nats / ln 2 / bytes of the split's
text: it does not depend on the vocabulary, so models with different tokenizers compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastlm.errors import DataError
from fastlm.model.checkpoint import LanguageModel
from fastlm.model.transformer import Transformer
from fastlm.training.data import TokenSplit, document_offsets
from fastlm.training.distributed import World

BATCH_SIZE = 16  # windows at once


@dataclass(frozen=True)
class Evaluation:
    """`loss` is in nats a token. `partial`: a sample of the windows was scored, and bits per byte are extrapolated."""

    loss: float
    bits_per_byte: float
    tokens: int
    partial: bool

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Window:
    """Targets `start + 1` to `end` of the stream, of which those from `score_from` on count."""

    start: int
    end: int
    score_from: int


def windows(num_tokens: int, context_length: int) -> list[Window]:
    """The windows over a stream whose first id is context only."""
    stride = max(1, context_length // 2)
    result = []
    scored, last = 0, num_tokens - 1
    while scored < last:
        end = min(last, context_length if scored == 0 else scored + stride)
        result.append(Window(max(0, end - context_length), end, scored))
        scored = end
    return result


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    split: TokenSplit,
    eos_token_id: int,
    *,
    max_windows: int | None = None,
    context_length: int | None = None,
    separate_documents: bool = False,
    world: World | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Scores the whole split, or `max_windows` evenly spaced windows of it; None when `should_stop` said so.

    Windows are of `context_length` tokens, by default the model's. With `separate_documents`, for a transformer, no
    token sees the documents before its own. The processes of a `world` share the windows.

    Raises:
        DataError: the split has no token to score.
    """
    every = windows(len(split), context_length or model.config.context_length)
    chosen = every
    if max_windows is not None and max_windows < len(every):
        chosen = [every[i] for i in np.linspace(0, len(every) - 1, max_windows).round().astype(int)]
    device = model.output_weight.device
    was_training = model.training
    model.eval()
    nats, count = 0.0, 0
    batches = list(_same_length_batches(chosen))
    world = world or World()
    shared = [*batches, *[batches[0]] * (-len(batches) % world.size)]  # each process computes as many, for FSDP
    for number in world.mine(list(range(len(shared)))):
        batch = shared[number]
        if should_stop is not None and should_stop():
            return None
        ids = torch.from_numpy(np.stack([split.read(w.start, w.end - w.start + 1) for w in batch]))
        inputs, targets = ids[:, :-1], ids[:, 1:].clone()
        for row, window in enumerate(batch):
            targets[row, : window.score_from - window.start] = -100
        targets[targets == eos_token_id] = -100
        inputs, targets = inputs.to(device), targets.to(device)
        if separate_documents and isinstance(model, Transformer):
            offsets = document_offsets(inputs, eos_token_id)
            losses = model.loss(inputs, targets, reduction="none", cu_seqlens=offsets)
        else:
            losses = model.loss(inputs, targets, reduction="none")
        if number < len(batches):
            nats += losses.double().sum().item()
            count += int((targets != -100).sum())
    model.train(was_training)
    nats, scored = world.sum(nats, count)
    count = int(scored)
    if count == 0 or split.num_bytes == 0:
        raise DataError("the validation split holds no text to score; give more text")
    partial = len(chosen) < len(every)
    loss = nats / count
    scored_tokens = _text_tokens(split, eos_token_id) if partial else count
    return Evaluation(loss, loss * scored_tokens / math.log(2) / split.num_bytes, count, partial)


def _same_length_batches(chosen: list[Window]) -> list[list[Window]]:
    """Consecutive windows of one length; the first and the last window may be shorter than the others."""
    batches: list[list[Window]] = []
    for window in chosen:
        full = not batches or len(batches[-1]) == BATCH_SIZE
        if full or window.end - window.start != batches[-1][0].end - batches[-1][0].start:
            batches.append([])
        batches[-1].append(window)
    return batches


def _text_tokens(split: TokenSplit, eos_token_id: int) -> int:
    step = 1 << 20
    pieces = (split.read(i, min(step, len(split) - i)) for i in range(0, len(split), step))
    return sum(int((piece != eos_token_id).sum()) for piece in pieces)
