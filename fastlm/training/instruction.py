"""Answers to instructions: the objective that trains a language model on the assistant's messages alone.

An answer is learned after exactly the ids that the model is given when it is asked: those of `chat_prompt`. Each answer
of a conversation is a row of its own, so that a template that writes earlier turns anew is no problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlm.errors import ConfigError, DataError
from fastlm.inference.chat import chat_prompt
from fastlm.model.classifier import document_start, groups, pack
from fastlm.model.transformer import Transformer
from fastlm.tokenizer import Tokenizer
from fastlm.training.config import TrainingConfig
from fastlm.training.distributed import World
from fastlm.training.examples import Conversation, ExampleOrder, spread
from fastlm.training.model_files import ModelFiles
from fastlm.training.objective import Objective, Score, check_divisible

PARTIAL_ROWS = 64
TOKENS_AT_ONCE = 2048  # of an evaluation
IGNORED = -100


class Answer(NamedTuple):
    """Ids of a prompt and of the answer to it, its end included."""

    prompt: list[int]
    answer: list[int]


class Batch(NamedTuple):
    ids: Tensor  # (tokens,) int64
    cu_seqlens: Tensor
    targets: Tensor  # (tokens,) int64; the next id where it is of an answer, else IGNORED
    total: int  # targets of the whole step


def answers_of(tokenizer: Tokenizer, conversation: Conversation) -> list[Answer]:
    """One for each message of the assistant.

    Raises:
        ConfigError: the conversation has another form, or the chat template refuses it.
        DataError: the assistant says nothing, or the tokenizer has no token that ends an answer.
    """
    messages = conversation.messages
    answers = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = chat_prompt(tokenizer, messages[:i])
        end = asked.stop_token_ids or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
        if not end:
            raise DataError("the tokenizer has no end-of-text token, so nothing would end an answer")
        content = message["content"].strip()
        if isinstance(asked.prompt, str):  # a transcript, whose last line is "Assistant:"
            prompt = document_start(tokenizer) + tokenizer.encode(asked.prompt, disallowed_special=())
            content = f" {content}"
        else:
            prompt = list(asked.prompt)
        answers.append(Answer(prompt, [*tokenizer.encode(content, disallowed_special=()), *end]))
    if not answers:
        raise DataError("a conversation holds no message of the assistant; there is nothing to learn from it")
    return answers


class Instruction(Objective[Batch]):
    """Cross-entropy of the answers' tokens, each token alike."""

    partial_size = PARTIAL_ROWS

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        train: Sequence[Conversation],
        valid: Sequence[Conversation],
        config: TrainingConfig,
        *,
        files: ModelFiles,
        max_length: int | None = None,
        world: World | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model: Transformer = model
        self.files = files
        self.world = world or World()
        self.accumulation = config.accumulation
        check_divisible(config, self.world)
        self.device = device
        length = min(max_length or model.config.context_length, model.config.context_length)
        self.rows = rows_of(tokenizer, train, length)
        self.valid_rows = rows_of(tokenizer, valid, length) if valid else []
        self.order = ExampleOrder(len(self.rows), config.batch_size, config.seed)
        self.validation_size = len(self.valid_rows)
        self.tokens_per_step = config.batch_size * sum(len(ids) for ids, _ in self.rows) // len(self.rows)

    def parts(self, step: int) -> list[Batch]:
        rows = [self.rows[i] for i in self.order.batch(step)]
        total = sum(int((targets != IGNORED).sum()) for _, targets in rows)
        mine = self.world.mine(rows)
        chunks = [mine[i :: self.accumulation] for i in range(self.accumulation)]
        return [batch_of(chunk, total, self.device) for chunk in chunks]

    def loss(self, part: Batch) -> Tensor:
        return self.model.loss(part.ids[None], part.targets[None], "sum", cu_seqlens=part.cu_seqlens) / part.total

    @torch.no_grad()
    def evaluate(self, size: int, should_stop: Callable[[], bool] | None = None) -> Score | None:
        chosen = [self.valid_rows[i] for i in spread(len(self.valid_rows), size)]
        nats, count, done = 0.0, 0, 0
        for group in groups([ids for ids, _ in chosen], TOKENS_AT_ONCE):
            if should_stop is not None and should_stop():
                return None
            batch = batch_of(chosen[done : done + len(group)], 1, self.device)
            done += len(group)
            nats += self.loss(batch).item()
            count += int((batch.targets != IGNORED).sum())
        loss = nats / count
        metrics = {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}
        return Score(loss, metrics, len(chosen) < len(self.valid_rows))


Row = tuple[np.ndarray, np.ndarray]  # inputs and targets, int32


def rows_of(tokenizer: Tokenizer, conversations: Sequence[Conversation], length: int) -> list[Row]:
    """Rows of at most `length` ids. A prompt that leaves no room for its answer loses its beginning, down to half of
    `length`; an answer that is longer still loses its end."""
    rows = []
    for conversation in conversations:
        for answer in answers_of(tokenizer, conversation):
            room = max(length + 1 - len(answer.answer), length // 2)
            prompt = answer.prompt[-room:]
            ids = np.array([*prompt, *answer.answer][: length + 1], dtype=np.int32)
            targets = ids[1:].copy()
            targets[: len(prompt) - 1] = IGNORED
            if (targets == IGNORED).all():
                raise ConfigError(f"--max-length {length} leaves no room for an answer; give more")
            rows.append((ids[:-1], targets))
    return rows


def batch_of(rows: Sequence[Row], total: int, device: torch.device | str) -> Batch:
    ids, cu_seqlens = pack([ids for ids, _ in rows], device)
    targets = torch.from_numpy(np.concatenate([targets for _, targets in rows]).astype(np.int64))
    return Batch(ids, cu_seqlens, targets.to(device), total)
