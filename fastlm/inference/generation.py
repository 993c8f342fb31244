"""Text from a model: a batch of prompts, each with its own settings, decoded together with a cache.

A row's logits depend on its own tokens, and its draws on its own seed and position, so what it says does not depend on
the rows beside it. (Matrix products may round differently for another batch size; that moves a draw only when two
tokens are tied to within rounding.)

A transformer sees at most `context_length` tokens. When a row's cache is full, the latest half of its tokens is read
again into an empty cache: each token is predicted from the last context_length / 2 to context_length tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastlm.errors import ConfigError
from fastlm.inference.sampling_params import SamplingParams
from fastlm.inference.text import TextStream
from fastlm.model.checkpoint import LanguageModel
from fastlm.model.rnn import RNNState
from fastlm.nn import KVCache
from fastlm.ops import sample
from fastlm.tokenizer import Tokenizer

Cache = KVCache | RNNState
FinishReason = Literal["length", "stop", "eos"]


@dataclass(frozen=True)
class Completion:
    """What followed a prompt. `token_ids` may hold bytes that `text` leaves out, see `TextStream`."""

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Piece:
    """Text that was added to one row. The last piece of a row says why it ended."""

    row: int
    text: str
    token_id: int | None
    finish_reason: FinishReason | None = None


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: SamplingParams | Sequence[SamplingParams],
) -> list[Completion]:
    """Continues each prompt.

    With one `params` for several prompts, row i is drawn with seed + i.

    Raises:
        ConfigError: the model and the tokenizer do not fit, or the number of `params` differs from that of prompts.
    """
    texts = _texts(prompts)
    pieces: list[list[Piece]] = [[] for _ in texts]
    for piece in stream(model, tokenizer, texts, params):
        pieces[piece.row].append(piece)
    return [
        Completion(
            prompt=text,
            text="".join(p.text for p in row),
            token_ids=[p.token_id for p in row if p.token_id is not None],
            finish_reason=row[-1].finish_reason or "length",
        )
        for text, row in zip(texts, pieces, strict=True)
    ]


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: SamplingParams | Sequence[SamplingParams],
) -> Iterator[Piece]:
    """Like `generate`, a piece at a time, of whole characters. A row's last piece has a `finish_reason`."""
    texts = _texts(prompts)
    if isinstance(params, SamplingParams):
        settings = [replace(params, seed=(params.seed + i) % (1 << 63)) for i in range(len(texts))]
    else:
        settings = list(params)
    if len(settings) != len(texts):
        raise ConfigError(f"{len(settings)} sampling parameters for {len(texts)} prompts")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {model.config.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token, with which texts begin")
    rows = [_Row(i, t, s, tokenizer) for i, (t, s) in enumerate(zip(texts, settings, strict=True))]
    yield from _decode(model, tokenizer, rows)


def _texts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        raise ConfigError("prompts must be a list of strings; put the one prompt into a list")
    return list(prompts)


class _Row:
    """One prompt and what was generated for it."""

    def __init__(self, index: int, prompt: str, params: SamplingParams, tokenizer: Tokenizer) -> None:
        assert tokenizer.eos_token_id is not None
        self.index = index
        self.params = params
        # A document begins after an end-of-text token, in training as here.
        self.ids = [tokenizer.eos_token_id, *tokenizer.encode(prompt, disallowed_special=())]
        self.prompt_length = len(self.ids)
        self.text = TextStream(params.stop)

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_length

    def accept(self, token: int, tokenizer: Tokenizer) -> Piece:
        """Takes the next token and says what text it adds, and whether the row ends with it."""
        self.ids.append(token)
        if token == tokenizer.eos_token_id:
            if not self.params.ignore_eos:
                return Piece(self.index, self.text.finish(), token, "eos")
            data = b"\n"  # what an end of text looks like inside one
        else:
            data = tokenizer.token_bytes(token)
        text = self.text.push(data)
        if self.text.stopped:
            return Piece(self.index, text, token, "stop")
        if self.generated >= self.params.max_tokens:
            return Piece(self.index, text + self.text.finish(), token, "length")
        return Piece(self.index, text, token)


@torch.inference_mode()
def _decode(model: LanguageModel, tokenizer: Tokenizer, rows: list[_Row]) -> Iterator[Piece]:
    was_training = model.training
    model.eval()
    active = []
    for row in rows:
        if row.params.max_tokens == 0:
            yield Piece(row.index, "", None, "length")
        else:
            active.append(row)
    cache = model.new_cache(len(active))
    logits = torch.cat([_read(model, cache, i, row.ids) for i, row in enumerate(active)]) if active else None
    while active and logits is not None:
        tokens = _sample(logits, active)
        pieces = [row.accept(token, tokenizer) for row, token in zip(active, tokens, strict=True)]
        yield from pieces
        going = [i for i, piece in enumerate(pieces) if piece.finish_reason is None]
        if len(going) < len(active):
            active = [active[i] for i in going]
            cache = cache.select(going)
        if active:
            logits = _next_logits(model, cache, active)
    model.train(was_training)


def _read(model: LanguageModel, cache: Cache, index: int, ids: list[int]) -> Tensor:
    """Reads a row's tokens into its empty cache; logits after the last, `(1, vocab_size)`."""
    if cache.capacity is not None and len(ids) > cache.capacity:
        ids = ids[-_half(cache.capacity) :]
    device = model.output_weight.device
    row = cache.row(index)
    hidden = model.hidden_states(torch.tensor([ids], device=device), row)  # type: ignore[arg-type]  # its own kind
    return model.logits(hidden[:, -1])


def _next_logits(model: LanguageModel, cache: Cache, active: list[_Row]) -> Tensor:
    """Logits after each row's last token, `(rows, vocab_size)`."""
    lengths = cache.lengths.tolist()
    if cache.capacity not in lengths:
        last = torch.tensor([[row.ids[-1]] for row in active], device=model.output_weight.device)
        return model(last, cache)[:, -1]
    logits = []
    for i, (row, length) in enumerate(zip(active, lengths, strict=True)):
        if length == cache.capacity:
            cache.row(i).clear()
            logits.append(_read(model, cache, i, row.ids[-_half(cache.capacity) :]))
        else:
            logits.append(_read(model, cache, i, row.ids[-1:]))
    return torch.cat(logits)


def _half(capacity: int | None) -> int:
    assert capacity is not None
    return max(1, capacity // 2)


def _sample(logits: Tensor, active: list[_Row]) -> list[int]:
    """One draw a row; neutral values stand for filters that a row does not want."""
    params = [row.params for row in active]

    def per_row(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    penalised = any(p.repetition_penalty != 1.0 for p in params)
    drawn = sample(
        logits,
        temperature=per_row([p.temperature for p in params]),
        top_k=per_row([p.top_k or 0 for p in params], torch.int64),
        top_p=per_row([1.0 if p.top_p is None else p.top_p for p in params]),
        min_p=per_row([p.min_p or 0.0 for p in params]),
        repetition_penalty=per_row([p.repetition_penalty for p in params]) if penalised else None,
        prompt_ids=_padded([row.ids for row in active], logits.device) if penalised else None,
        seed=per_row([p.seed for p in params], torch.int64),
        position=per_row([row.generated for row in active], torch.int64),
    )
    return drawn.ids.tolist()


def _padded(ids: list[list[int]], device: torch.device) -> Tensor:
    rows = [torch.tensor(row, device=device) for row in ids]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
